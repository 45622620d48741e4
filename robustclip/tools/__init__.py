"""Holds the commands other than fit, validate and test, one file each."""
