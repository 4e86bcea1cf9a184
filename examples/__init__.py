"""Small programs to read and to copy. Each is run by `tests/test_examples.py`."""
