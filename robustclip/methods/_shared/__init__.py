"""Code that several methods share; it is not public."""
