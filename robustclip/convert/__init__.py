"""Import, export and conversion of checkpoints."""
