from __future__ import annotations

from fastapi.testclient import TestClient

from examples.shop.resources import Settings

from .conftest import Mailbox
from .test_orders import order

TOKEN = {"token": "secret"}


def test_newsletter(client: TestClient, mailbox: Mailbox, settings: Settings) -> None:
    """Everybody gets the newsletter, in the order of the list, and the request is in the audit log."""
    newsletter = {"recipients": ["ada@example.org", "grace@example.org"], "text": "Tea is back."}
    answer = client.post("/admin/newsletter", json=newsletter, headers=TOKEN)
    assert (answer.status_code, answer.json()) == (202, {"recipients": 2})
    assert mailbox.mails == [(to, "News from the shop", "Tea is back.") for to in newsletter["recipients"]]
    assert settings.audit_log.read_text() == "POST /admin/newsletter\n"


def test_export(client: TestClient, mailbox: Mailbox, tea: int) -> None:
    """The orders are exported as a stream of lines, and the owner is told."""
    for quantity in (1, 2):
        order(client, tea, quantity)
    answer = client.get("/admin/orders.csv", headers=TOKEN)
    assert answer.text.splitlines()[1:] == ["1,ada@example.org,tea,1", "2,ada@example.org,tea,2"]
    assert mailbox.mails[2:] == [("owner@example.org", "Export", "The orders were exported.")]


def test_only_the_owner(client: TestClient, settings: Settings) -> None:
    """Without the owner's token a request is refused, and it is not in the log of successful ones."""
    assert client.get("/admin/orders.csv").status_code == 403
    assert not settings.audit_log.exists()
