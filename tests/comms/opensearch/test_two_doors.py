"""Two boxes behind a load balancer share an indexer and signing keys: one agent, any request to any of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from osqbox.settings import CommsSettings
from tests.comms._door import KEY, Door, Known, opened

from .standin import StandIn


@pytest.mark.parametrize("user", ["", "osqbox"])
def test_one_agent_uses_both_boxes_and_logs_in_once(tmp_path: Path, user: str) -> None:
    """Login on A; events, configuration and the stream on B; a command published on A; its result told to A."""

    async def test(a: Door, b: Door) -> None:
        uuid = (await a.agent("web-1")).uuid
        told = await a.ask("POST", "/login", 200, json={"uuid": uuid, "password": KEY})
        token = told.json()["token"]
        on_a, on_b = Known(a, uuid, token), Known(b, uuid, token)
        event = {"module": "inventory", "collector": "packages", "id": "bash", "data": {"name": "bash"}}
        first = (await on_b.ask("POST", "/events/stateful", 200, json=event)).json()
        assert first["results"][0]["status"] == 201
        assert (await on_a.ask("POST", "/events/stateful", 200, json=event)).json() == first
        await a.local_ask("PUT", "/configuration", 200, content="level: 3\n")
        assert (await on_b.ask("GET", "/configuration", 200)).json()["configuration"] == {"level": 3}
        async with on_b.listening() as stream:
            assert (await stream.next())[2]["action"]["name"] == "fetch-config"
            document = await a.publish(uuid)
            assert (await stream.next())[2]["document_id"] == document
            async with on_a.listening() as newer:
                kind, _, data = await stream.next()
                assert (kind, data["reason"]) == ("bye", "replaced")
                assert (await newer.next())[0] == "command"
        report = {"module": "command", "id": document, "data": {"result": {"code": 0, "message": "done"}}}
        await on_a.ask("POST", "/events/stateful", 200, json=report)
        for door in (a, b):
            found = await door.comms.indexer.commands.find(document)
            assert found is not None
            assert found.status == "success"
        assert b.comms.statistics()["indexer"]["up"] is True

    async def main(url: str, auth: Path | None) -> None:
        settings = CommsSettings(
            token_algorithm="ES256", keys_dir=tmp_path / "shared-keys", indexer_url=url, indexer_auth_file=auth
        )
        with trio.fail_after(40):
            for name in ("a", "b"):
                (tmp_path / name).mkdir()
            async with opened(tmp_path / "a", settings) as a, opened(tmp_path / "b", settings) as b:
                await test(a, b)

    auth = None
    if user:
        auth = tmp_path / "auth"
        auth.write_text("osqbox:secret\n")
    with StandIn(user=user, password="secret" if user else "") as server:
        trio.run(main, server.url, auth)
