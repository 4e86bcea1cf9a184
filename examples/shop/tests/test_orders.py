from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from .conftest import Mailbox


def order(client: TestClient, product: int, quantity: int = 1, email: str = "ada@example.org") -> int:
    answer = client.post("/api/orders", json={"product_id": product, "email": email, "quantity": quantity})
    return answer.json()["id"] if answer.status_code == 201 else answer.status_code


def test_order(client: TestClient, mailbox: Mailbox, tea: int) -> None:
    """An order is confirmed by a mail, and who watches the stock hears of it."""
    with client.websocket_connect("/stock") as updates:
        placed = order(client, tea, quantity=2)
        assert updates.receive_json() == {"product": tea, "stock": 1}
    assert mailbox.mails == [("ada@example.org", f"Order {placed}", "2 x tea is on its way.")]


def test_not_enough_in_stock(client: TestClient, mailbox: Mailbox, tea: int) -> None:
    """An order of more than there is changes nothing, and the owner gets a mail instead of the customer."""
    assert order(client, tea, quantity=4) == 409
    assert client.get(f"/api/products/{tea}").json()["stock"] == 3
    assert mailbox.mails == [("owner@example.org", "Out of stock", "Customers want more tea.")]


def test_return(client: TestClient, mailbox: Mailbox, tea: int) -> None:
    """What is sent back is in stock again, once, and its customer gets a mail."""
    placed = order(client, tea)
    with client.websocket_connect("/stock") as updates:
        assert client.post(f"/api/orders/{placed}/return").json()["returned"] is True
        assert updates.receive_json() == {"product": tea, "stock": 3}
    assert client.post(f"/api/orders/{placed}/return").status_code == 409
    assert client.post("/api/orders/7/return").status_code == 404
    assert mailbox.mails[1:] == [("ada@example.org", f"Order {placed}", "You get your money back.")]


def test_invoice(client: TestClient, tea: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An invoice is a file to download, of which nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    placed = order(client, tea)
    answer = client.get(f"/api/orders/{placed}/invoice")
    assert answer.text == f"Invoice {placed}: 1 x tea, to ada@example.org\n"
    assert answer.headers["content-disposition"] == f'attachment; filename="invoice-{placed}.txt"'
    assert list(tmp_path.glob("invoice-*")) == []
