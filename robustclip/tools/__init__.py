"""Commands beside fit, validate and test, one file each."""
