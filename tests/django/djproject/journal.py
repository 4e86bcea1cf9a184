"""What happened in this process, in order."""

from __future__ import annotations

journal: list[str] = []
