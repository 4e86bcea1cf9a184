"""Tries small scenarios under many schedules: `python -m tests.explorer --help`.

A *schedule* is what a seed decides: the order in which an event loop runs what is ready, which thread runs between
two calls of the library, and when time passes. One seed gives one schedule, so what a seed finds can be replayed.
"""
