"""A small shop, written for plain FastAPI."""
