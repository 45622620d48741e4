"""Files that a test leaves, and the code that reads them."""
