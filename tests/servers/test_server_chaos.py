"""Sixty of the chaos program's hundred runs, the same seeds every time; `python -m tests.servers.chaos` makes them all."""

from __future__ import annotations

import pytest

from .chaos import SERVERS, faults, main

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("name", SERVERS)
def test_chaos(name: str) -> None:
    """G1, G2, G8, G11: whatever clients, applications and tasks do, each accepted task has exactly one end, and no earlier than allowed."""
    assert main([name], range(16)) == 0


ACCOUNT = '{"accepted": 1, "pending": 0, "running": 0, "succeeded": 1, "failed": 0, "timed_out": 0, "skipped": 0, "cancelled": 0, "abandoned": 0}'
RIGHT = ["accepted 1.0.0", "over 1.0", "event 1.0.0 RUNNING", "event 1.0.0 SUCCEEDED", f"end [{ACCOUNT}, []]"]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (RIGHT, []),
        (RIGHT[:-1], ["the lifespan's end was seen 0 times"]),
        ([*RIGHT[:3], RIGHT[4]], ["1.0.0 was accepted and had 0 final events", "SUCCEEDED: 1 counted, 0 events"]),
        ([*RIGHT, RIGHT[3]], ["1.0.0 was accepted and had 2 final events"]),
        (RIGHT[1:], ["1.0.0 had an end and was never accepted"]),
        ([RIGHT[0], RIGHT[2], RIGHT[1], *RIGHT[3:]], ["1.0.0 ran before its request was over"]),
        ([*RIGHT[:4], RIGHT[4].replace("[]", '["1.0.0"]')], ["the lists of ['1.0'] are still alive"]),
        ([*RIGHT[:4], RIGHT[4].replace('pending": 0', 'pending": 1')], ["what was accepted is not the sum of "]),
    ],
)
def test_what_counts_as_a_fault(lines: list[str], found: list[str]) -> None:
    """G2: the judge of the chaos runs tells a right transcript from one that breaks a promise."""
    actual = list(faults(lines, 0))
    assert len(actual) == len(found)
    assert all(fault.startswith(start) for fault, start in zip(actual, found, strict=True))
