"""One table to write to."""

from __future__ import annotations

from django.db import models


class Entry(models.Model):
    """A line."""

    text: models.CharField[str, str] = models.CharField(max_length=100)
