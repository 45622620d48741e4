"""The command line; `main` answers light commands without importing torch."""
