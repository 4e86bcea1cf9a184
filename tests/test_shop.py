"""The shop of the examples, written for plain FastAPI: its own tests as they are, and again with the one line."""

from __future__ import annotations

import linecache
import smtplib
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

import pytest
from fastapi import FastAPI
from fastapi import __version__ as fastapi_version
from fastapi.testclient import TestClient

from asgi_deferred import Runner, TaskEvent, TaskState
from asgi_deferred.fastapi import DeferredMiddleware
from examples.shop import tests as shop_tests
from examples.shop.main import create_app
from examples.shop.resources import Settings
from examples.shop.tests.conftest import Mailbox, client, mailbox, settings, tea
from examples.shop.tests.test_admin import TOKEN
from examples.shop.tests.test_orders import order

from .support import assert_conserved

__all__ = ["client", "mailbox", "settings", "tea"]  # fixtures

pytestmark = pytest.mark.skipif(
    tuple(int(each) for each in fastapi_version.split(".")[:2]) < (0, 118),
    reason="this FastAPI closes sessions and uploads ahead of its background tasks",
)

for module in iter_modules(shop_tests.__path__):
    for name, value in vars(import_module(f"{shop_tests.__name__}.{module.name}")).items():
        if name.startswith("test_"):
            globals()[f"{module.name}_{name}"] = value

# The tasks that each test adds, in the order in which they end.
ADDED = {
    "test_admin_test_newsletter": ["write_audit", "send", "send"],
    "test_admin_test_export": ["send", "publish"] * 2 + ["write_audit", "send"],
    "test_admin_test_only_the_owner": [],
    "test_catalog_test_views_are_counted": ["count_view"] * 2,
    "test_catalog_test_no_such_product": [],
    "test_catalog_test_picture": ["store", "show_picture", "count_view"],
    "test_catalog_test_import": ["import_products"] + ["count_view"] * 2,
    "test_orders_test_order": ["send", "publish"],
    "test_orders_test_not_enough_in_stock": ["count_view"],
    "test_orders_test_return": ["send", "publish"] * 2,
    "test_orders_test_invoice": ["send", "publish", "unlink"],
}


@pytest.fixture(params=["plain", "moved"])
def app(request: pytest.FixtureRequest, settings: Settings) -> Iterator[FastAPI]:
    app = create_app(settings)
    ended: list[str] = []

    def note(event: TaskEvent) -> None:
        if event.state is TaskState.SUCCEEDED:
            ended.append(event.task.name)

    runner = Runner(observers=[note])
    if request.param == "moved":
        app.add_middleware(DeferredMiddleware, runner=runner)
    yield app
    print(request.node.originalname, ended)
    assert_conserved(runner)
