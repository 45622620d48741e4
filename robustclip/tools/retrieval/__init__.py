"""Holds the parts of `robustclip retrieve`: the pool, its features, and the search."""
