"""A few kills of each durable example; `python -m tests.servers.kill_proof` makes as many as you like."""

from __future__ import annotations

from pathlib import Path

import pytest

from .kill_proof import Record, Verdict, judge, prove

pytestmark = pytest.mark.servers

KILLS = 3  # of this seed: one while requests are sent, one while they are answered, one while jobs run
SEED = 3


def test_dbos_on_sqlite(tmp_path: Path) -> None:
    """G11: each 202 of DBOS on SQLite, served by two processes, has its effect at least once, whether its job waited or ran at a kill."""
    verdict = prove("examples.durable_sqlite:app", kills=KILLS, seed=SEED, folder=tmp_path, workers=2)
    assert verdict.holds, verdict


def test_huey_on_sqlite(tmp_path: Path) -> None:
    """G11: a 202 of huey on SQLite outlives a kill while its job waits, and huey loses at most the one job that each worker runs."""
    consumer = "huey.bin.huey_consumer examples.durable_huey.queue --workers 2"
    verdict = prove("examples.durable_huey:app", kills=KILLS, seed=SEED, folder=tmp_path, beside=[consumer], quiet=1)
    assert verdict.accepted > 0
    assert len(verdict.lost) <= 2 * KILLS, verdict
    assert (verdict.repeated, verdict.unknown) == ({}, [])


RIGHT = Record(accepted=["a", "b"], refused=["c"], unanswered=["d"], done=["a"])


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (Record(done=["b"]), Verdict(2, 1, 1, 1, [], {}, [], [], [])),
        (Record(accepted=["e"], done=["e"]), Verdict(3, 1, 1, 0, ["b"], {}, [], [], [])),
        (Record(done=["a", "b"]), Verdict(2, 1, 1, 1, [], {"a": 2}, [], [], [])),
        (Record(done=["b", "b"]), Verdict(2, 1, 1, 1, [], {"b": 2}, ["b"], [], [])),
        (Record(done=["b", "c", "d"]), Verdict(2, 1, 1, 1, [], {}, [], ["c", "d"], [])),
        (Record(done=["b", ""]), Verdict(2, 1, 1, 1, [], {}, [], [], [""])),
    ],
)
def test_what_counts_as_lost(second: Record, found: Verdict) -> None:
    """The judge of the kills tells what was lost, repeated, done without a promise, and never asked for."""
    verdict = judge([RIGHT, second])
    assert verdict == found
    assert verdict.holds == (not found.lost and not found.unknown)


def test_nothing_accepted_proves_nothing() -> None:
    """A run in which no signup was answered with 202 does not hold."""
    assert not judge([Record(unanswered=["a"], done=["a"])]).holds
