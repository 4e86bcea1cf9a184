from __future__ import annotations

from fastapi.testclient import TestClient


def test_views_are_counted(client: TestClient, tea: int) -> None:
    """A product is shown as it is, and then one view more is in the database."""
    shown = client.get(f"/api/products/{tea}").json()
    assert shown == {"id": tea, "name": "tea", "stock": 3, "views": 0, "picture": None}
    assert client.get(f"/api/products/{tea}").json()["views"] == 1


def test_no_such_product(client: TestClient) -> None:
    """A product that does not exist is a 404, and its answer is timed as any other."""
    answer = client.get("/api/products/7")
    assert (answer.status_code, answer.headers["server-timing"][:8]) == (404, "app;dur=")


def test_picture(client: TestClient, tea: int) -> None:
    """An uploaded picture, too large for memory, is stored, served, and its product knows it."""
    content = b"picture" * 200_000
    answer = client.put(f"/api/products/{tea}/picture", files={"picture": ("tea.png", content)})
    assert (answer.status_code, answer.json()) == (202, {"picture": f"/media/{tea}.png"})
    assert client.get(f"/media/{tea}.png").content == content
    assert client.get(f"/api/products/{tea}").json()["picture"] == f"{tea}.png"


def test_import(client: TestClient) -> None:
    """A supplier's list is imported: each of its lines becomes a product."""
    answer = client.post("/api/products/import", files={"upload": ("list.csv", b"name,stock\ntea,3\ncups,12\n")})
    assert (answer.status_code, answer.json()) == (202, {"importing": "list.csv"})
    found = [client.get(f"/api/products/{each}").json() for each in (1, 2)]
    assert [(each["name"], each["stock"]) for each in found] == [("tea", 3), ("cups", 12)]
