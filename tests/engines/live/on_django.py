"""Settings, and behind them the job: the module that DJANGO_SETTINGS_MODULE names."""

from __future__ import annotations

from urllib.parse import urlsplit

from .common import BROKER

_url = urlsplit(BROKER)

INSTALLED_APPS = ["django_tasks", "django_tasks_db"]
USE_TZ = True
SECRET_KEY = "live"
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.path.removeprefix("/"),
        "HOST": _url.hostname,
        "PORT": _url.port,
        "USER": _url.username,
    }
}
