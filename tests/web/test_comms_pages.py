"""The pages of the comms API in a real browser, against a real box with a real agent."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import trio

from osqbox.box import Box, open_box
from osqbox.settings import CommsSettings, Settings

from . import browser as chromium

TOKEN = "a-token-of-tests"
HOSTILE = "<img src=x onerror=alert(1)><script>document.title='owned'</script>"


def with_pages(tmp_path: Path, test: Callable[[Box, chromium.Browser], Awaitable[None]]) -> None:
    async def main() -> None:
        data = tmp_path / "data"
        data.mkdir()
        settings = Settings(
            data, tmp_path / "certs", agents_port=0, operator_port=0, token=TOKEN, comms=CommsSettings(port=0)
        )
        with trio.fail_after(50):
            async with open_box(settings) as box, chromium.open_browser() as browser:
                await browser.go(box.operator_url)
                assert await browser.path() == "/sign-in"
                await browser.fill("input[name=token]", TOKEN)
                await browser.press("main form button")
                assert await browser.path() == "/comms/agents"
                await test(box, browser)
                # A refused form is told there too; what the policy blocks, or what is missing, would be a fault.
                assert [text for text in browser.console if "status of 4" not in text] == []

    trio.run(main)


async def look(browser: chromium.Browser, name: str) -> None:
    """Keep a picture where ``OSQBOX_SCREENSHOTS`` says."""
    shot = await browser.screenshot()
    assert shot.startswith(b"\x89PNG")
    if folder := os.environ.get("OSQBOX_SCREENSHOTS"):
        await trio.Path(folder, f"{name}.png").write_bytes(shot)


def test_an_agent_from_its_adding_to_its_revocation(tmp_path: Path) -> None:
    async def test(box: Box, browser: chromium.Browser) -> None:
        await browser.fill("main form[action='/comms/agents'] input[name=name]", "kiosk-7")
        await browser.press("main form[action='/comms/agents'] button")
        uuid, key = await browser.run("[...document.querySelectorAll('dd code')].map(e => e.innerText)")
        assert len(key) == 32
        await look(browser, "added")

        async with httpx.AsyncClient(base_url=box.ready()["comms"], verify=False) as agent:
            token = (await agent.post("/login", json={"uuid": uuid, "password": key})).json()["token"]
            agent.headers["Authorization"] = f"Bearer {token}"
            event = {"module": "logcollector", "data": {"line": "door opened", "hostile": HOSTILE}}
            assert (await agent.post("/events/stateless", json=event)).status_code == 202
            state = {"id": "p-1", "module": "inventory", "collector": "packages", "data": {"package": {"name": "vim"}}}
            answer = (await agent.post("/events/stateful", json=state)).json()
            assert answer["errors"] is False

            await browser.press(f"a[href='/comms/agents/{uuid}']")
            await browser.run("document.querySelector('select[name=name]').value = 'restart'")
            await browser.press("form[action='/comms/commands'] button")
            assert "pending" in await browser.text()

            await browser.press("nav a[href='/comms/events']")
            while "door opened" not in await browser.text():  # stored a moment after the answer
                await browser.go(f"{box.operator_url}/comms/events?q=opened")
            assert HOSTILE in (await browser.text()).replace("\\", "")
            assert "owned" not in str(await browser.run("document.title"))
            assert await browser.run("document.querySelectorAll('main img, main script').length") == 0
            await look(browser, "events")

            await browser.go(f"{box.operator_url}/comms/states?q=vim")
            assert "wazuh-states-inventory-packages" in await browser.text()
            await look(browser, "states")

            await browser.go(f"{box.operator_url}/comms/agents/{uuid}")
            await look(browser, "agent")
            await browser.press("button[value=revoked]")
            assert "revoked" in (await browser.text()).lower()
            refused = await agent.post("/events/stateless", json=event)
            assert refused.status_code == 401

    with_pages(tmp_path, test)


def test_a_group_is_configured_and_its_agents_are_told(tmp_path: Path) -> None:
    async def test(box: Box, browser: chromium.Browser) -> None:
        api = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=box.operator_url, headers=api) as operator:
            added = (await operator.post("/api/v1/agents", json={"name": "till-1"})).json()
            await browser.press("nav a[href='/comms/groups']")
            await browser.press("a[href='/comms/groups/default']")
            await browser.fill("textarea", "agent:\n  verbose: yes please\n")
            await browser.press("main form button")
            assert "version 1" in await browser.text()
            await look(browser, "group")
            await browser.fill("textarea", "a: [unclosed")
            await browser.press("main form button")
            assert "Not done" in await browser.text()

            await browser.press("nav a[href='/comms/commands']")
            page = await browser.text()
            assert "fetch-config" in page
            assert "till-1" in page
            await look(browser, "commands")
            await browser.press("td form button")
            assert "cancelled" in await browser.text()
            told = (await operator.get("/api/v1/commands", params={"agent": added["uuid"]})).json()
            assert [(each["action"]["name"], each["status"]) for each in told] == [("fetch-config", "cancelled")]

    with_pages(tmp_path, test)


def test_empty_pages_say_so(tmp_path: Path) -> None:
    async def test(box: Box, browser: chromium.Browser) -> None:
        for path, words in {
            "agents": "No agents",
            "commands": "No commands yet",
            "events": "No events",
            "states": "No documents",
            "upgrades": "osqbox comms upgrades add",
        }.items():
            await browser.press(f"nav a[href='/comms/{path}']")
            assert words in await browser.text()
            assert await browser.run("document.querySelector('nav a[aria-current]').getAttribute('href')") == (
                f"/comms/{path}"
            )
        await browser.go(f"{box.operator_url}/comms/agents/nobody")
        assert "does not exist" in await browser.text()
        await browser.press("header form button")
        assert await browser.path() == "/sign-in"

    with_pages(tmp_path, test)
