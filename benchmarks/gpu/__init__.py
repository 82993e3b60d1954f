"""What is measured on a GPU host; every table states its limit beside it."""
