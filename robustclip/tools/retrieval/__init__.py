"""What `robustclip retrieve` is made of: the pool, its features, and the search in them."""
