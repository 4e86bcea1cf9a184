"""Small programs to read and to copy, run by `tests/test_examples.py`; the shop has tests of its own."""
