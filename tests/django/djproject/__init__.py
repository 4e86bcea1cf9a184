"""A Django project to test with, in this process and in servers."""
