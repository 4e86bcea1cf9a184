"""SQLite in the file named by DJPROJECT_SQLITE, or the PostgreSQL database at DJPROJECT_POSTGRES."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import django

SECRET_KEY = "for tests"
ALLOWED_HOSTS = ["*"]
TIME_ZONE = "UTC"
ROOT_URLCONF = "tests.django.djproject.urls"
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "asgi_deferred.django",
    "tests.django.djproject",
]
MIDDLEWARE = ["tests.django.djproject.middleware.defer_in_middleware"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGGING_CONFIG = None
DEFAULT: dict[str, Any] = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": os.environ.get("DJPROJECT_SQLITE", "unused.sqlite3"),
    "OPTIONS": {"timeout": 30, "transaction_mode": "IMMEDIATE"},
}
if "DJPROJECT_POSTGRES" in os.environ:
    url = urlsplit(os.environ["DJPROJECT_POSTGRES"])
    DEFAULT = {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": url.hostname,
        "PORT": url.port,
        "USER": url.username,
        "PASSWORD": url.password,
        "NAME": url.path[1:],
        "CONN_MAX_AGE": int(os.environ.get("DJPROJECT_CONN_MAX_AGE", "0")),
    }
    if "DJPROJECT_POOL" in os.environ:
        DEFAULT["OPTIONS"] = {"pool": {"min_size": 1, "max_size": int(os.environ["DJPROJECT_POOL"])}}
DATABASES = {"default": DEFAULT}
if django.VERSION >= (6, 0):
    TASKS = {
        "default": {"BACKEND": "asgi_deferred.django.DeferredBackend"},
        "dummy": {"BACKEND": "django.tasks.backends.dummy.DummyBackend"},
        "careful": {
            "BACKEND": "asgi_deferred.django.DeferredBackend",
            "OPTIONS": {"when": "success", "result_ttl": 60, "max_results": 2},
        },
    }
