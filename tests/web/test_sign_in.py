"""The door of the pages: the token opens it, a cookie keeps it open, nothing else does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import trio

from osqbox.box import Box, open_box
from osqbox.settings import Settings
from osqbox.web.sessions import LIFETIME_S, MOST, Sessions

TOKEN = "a-token-of-tests"
PAGES = ("/", "/comms/agents", "/comms/commands", "/comms/events", "/comms/states", "/comms/groups", "/comms/upgrades")


def with_box(tmp_path: Path, test: Callable[[Box, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        data = tmp_path / "data"
        data.mkdir()
        settings = Settings(data, tmp_path / "certs", agents_port=0, operator_port=0, token=TOKEN)
        with trio.fail_after(30):
            async with open_box(settings) as box, httpx.AsyncClient(base_url=box.operator_url) as client:
                await test(box, client)

    trio.run(main)


def test_every_page_asks_a_stranger_to_sign_in(tmp_path: Path) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        for path in PAGES:
            answer = await client.get(path)
            assert (path, answer.status_code, answer.headers["location"]) == (path, 303, "/sign-in")
            assert not answer.content
        answer = await client.get("/comms/agents", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 303  # a page takes the cookie only: browsers never send the other by themselves
        assert (await client.post("/comms/commands", data={"name": "restart"})).headers["location"] == "/sign-in"

    with_box(tmp_path, test)


def test_the_token_opens_and_signing_out_closes(tmp_path: Path) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        wrong = await client.post("/sign-in", data={"token": "guessed"})
        assert wrong.status_code == 403
        assert "set-cookie" not in wrong.headers
        assert "guessed" not in wrong.text

        answer = await client.post("/sign-in", data={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith(f"osqbox-{box.operator.port}=")
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie

        assert (await client.get("/")).headers["location"] == "/comms/agents"
        kept = cookie.partition(";")[0]
        assert (await client.post("/sign-out")).headers["location"] == "/sign-in"
        assert (await client.get("/", headers={"Cookie": kept})).headers["location"] == "/sign-in"

    with_box(tmp_path, test)


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_a_form_of_a_foreign_page_is_refused(tmp_path: Path, headers: dict[str, str]) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        assert (await client.post("/sign-in", data={"token": TOKEN}, headers=headers)).status_code == 403
        await client.post("/sign-in", data={"token": TOKEN})
        for path in ("/comms/agents", "/comms/commands", "/comms/groups", "/sign-out"):
            assert (await client.post(path, data={"name": "x"}, headers=headers)).status_code == 403
        assert (await client.get("/")).headers["location"] == "/comms/agents"

    with_box(tmp_path, test)


def test_pages_allow_no_script_and_no_frame(tmp_path: Path) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        answer = await client.get("/sign-in")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script" not in policy
        assert "<script" not in answer.text
        style = await client.get("/static/style.css")
        assert style.headers["content-type"].startswith("text/css")

    with_box(tmp_path, test)


def test_the_api_takes_no_cookie(tmp_path: Path) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        await client.post("/sign-in", data={"token": TOKEN})
        assert (await client.get("/api/v1/info")).status_code == 401

    with_box(tmp_path, test)


def test_sessions_end_and_are_bounded() -> None:
    keys = iter(range(1000))
    sessions = Sessions(lambda: f"key-{next(keys)}")
    first = sessions.open(0.0)
    assert sessions.is_open(first, LIFETIME_S - 1)
    assert not sessions.is_open(first, LIFETIME_S)
    assert not sessions.is_open("", 0.0)
    assert not sessions.is_open("key-7", 0.0)
    opened = [sessions.open(1.0) for _ in range(MOST)]
    assert not sessions.is_open(first, 1.0)  # the oldest made room
    assert all(sessions.is_open(key, 1.0) for key in opened)
    sessions.close(opened[0])
    assert not sessions.is_open(opened[0], 1.0)
