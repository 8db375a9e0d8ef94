"""Upgrade files and groups' configuration over the operator API, as a box serves it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from osqbox.box import Box, open_box
from osqbox.settings import CommsSettings, Settings

Test = Callable[[Box, httpx.AsyncClient], Awaitable[None]]
DATA = os.urandom(30 * 1024 * 1024)
"""More than the API takes of anything else."""
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certs")


@pytest.fixture
def run(tmp_path: Path, certs: Path) -> Callable[..., None]:
    async def main(test: Test, **more: Any) -> None:
        comms = more.pop("comms", CommsSettings(port=0, token_algorithm="ES256"))
        settings = Settings(tmp_path / "data", certs, agents_port=0, operator_port=0, comms=comms)
        settings.data_dir.mkdir()
        with trio.fail_after(50):
            async with (
                open_box(settings) as box,
                httpx.AsyncClient(
                    base_url=f"{box.operator_url}/api/v1",
                    headers={"Authorization": f"Bearer {box.token}"},
                    trust_env=False,
                    timeout=20,
                ) as client,
            ):
                await test(box, client)

    return lambda test, **more: trio.run(lambda: main(test, **more))


def failure(answered: httpx.Response, status: int, reason: str) -> str:
    assert answered.status_code == status, answered.text
    told = answered.json()
    assert (set(told), told["reason"]) == ({"error", "reason", "hint"}, reason)
    return str(told["error"])


def head(box: Box, size_bytes: int) -> bytes:
    host = f"Host: 127.0.0.1:{box.operator.port}\r\nAuthorization: Bearer {box.token}"
    return f"PUT /api/v1/upgrades/a.wpk HTTP/1.1\r\n{host}\r\nContent-Length: {size_bytes}\r\n\r\n".encode()


def spooled(box: Box) -> list[Path]:
    return [path for path in (box.settings.data_dir / "upgrades").rglob("*") if path.is_file()]


def test_a_file_is_uploaded_listed_and_removed(run: Callable[..., None]) -> None:
    async def test(_box: Box, client: httpx.AsyncClient) -> None:
        put = await client.put("/upgrades/agent.wpk", content=DATA, headers={"X-Checksum-SHA256": SHA256})
        assert put.status_code == 200
        facts = put.json()
        assert (facts["name"], facts["sha256"], facts["size_bytes"]) == ("agent.wpk", SHA256, len(DATA))
        assert (facts["tenant"], facts["added_by"]) == ("default", "operator")
        assert (await client.get("/upgrades")).json() == [facts]
        assert (await client.get("/upgrades/agent.wpk")).json() == facts
        assert (await client.get("/upgrades?tenant=other")).json() == []
        assert (await client.delete("/upgrades/agent.wpk")).json() == {"deleted": "agent.wpk"}
        failure(await client.delete("/upgrades/agent.wpk"), 404, "not_found")
        failure(await client.get("/upgrades/agent.wpk"), 404, "not_found")

    run(test)


def test_an_upload_does_not_pass_through_memory(run: Callable[..., None]) -> None:
    async def chunks(_box: Box) -> Any:
        for _ in range(80):
            yield bytes(1024 * 1024)

    async def test(box: Box, client: httpx.AsyncClient) -> None:
        import psutil

        before = psutil.Process().memory_info().rss
        put = await client.put("/upgrades/large.wpk", content=chunks(box), timeout=40)
        assert put.json()["size_bytes"] == 80 * 1024 * 1024
        assert psutil.Process().memory_info().rss - before < 40 * 1024 * 1024

    run(test)


def test_uploads_that_are_refused_leave_nothing(run: Callable[..., None]) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        small = b"x" * 1000
        wrong = {"X-Checksum-SHA256": "0" * 64}
        assert "expected the body's" in failure(
            await client.put("/upgrades/a.wpk", content=small, headers=wrong), 400, "bad_request"
        )
        failure(await client.put("/upgrades/..", content=small), 404, "unknown_path")
        failure(await client.put("/upgrades/.a", content=small), 400, "bad_request")
        failure(await client.put("/upgrades/a%2Fb", content=small), 400, "bad_request")
        failure(await client.put("/upgrades/a.wpk?tenant=nobody", content=small), 404, "not_found")
        for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
            failure(await client.put("/upgrades/a.wpk", content=DATA, headers=headers), 401, "unauthorized")
        failure(await client.put("/upgrades/a.wpk", content=small, headers={"Origin": "http://evil"}), 403, "foreign")
        failure(await client.put("/upgrades/a.wpk", content=small, headers={"Host": "evil"}), 421, "wrong_host")
        async with await trio.open_tcp_stream("127.0.0.1", box.operator.port) as stream:
            await stream.send_all(head(box, 9_999_999_999))
            assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 413 ")
        assert spooled(box) == []
        assert (await client.get("/upgrades")).json() == []

    run(test)


def test_a_sender_that_leaves_in_the_middle_leaves_nothing(run: Callable[..., None]) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", box.operator.port) as stream:
            await stream.send_all(head(box, 2_000_000) + bytes(1_500_000))
            while not spooled(box):
                await trio.sleep(0.005)
        while spooled(box):
            await trio.sleep(0.005)
        assert (await client.get("/upgrades")).json() == []
        assert box.operator.statistics().errors == 0

    run(test)


def test_curl_uploads_a_file_as_it_is(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(box: Box, _client: httpx.AsyncClient) -> None:
        (tmp_path / "a.wpk").write_bytes(DATA)
        url = f"{box.operator_url}/api/v1/upgrades/a.wpk"
        command = ["curl", "-sSf", "-T", str(tmp_path / "a.wpk"), "-H", f"Authorization: Bearer {box.token}", url]
        done = await trio.run_process(command, capture_stdout=True)
        assert SHA256.encode() in done.stdout

    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    run(test)


def test_a_groups_configuration_is_read_and_changed(run: Callable[..., None]) -> None:
    async def test(_box: Box, client: httpx.AsyncClient) -> None:
        text = {"Content-Type": "text/plain"}
        first = await client.put("/configuration", content="a: {b: 1}\n", headers=text)
        assert first.status_code == 200
        assert (first.json()["configuration"], first.json()["version"]) == ({"a": {"b": 1}}, 1)
        assert (await client.get("/configuration")).json() == first.json()
        assert first.headers["etag"] == f'"{first.json()["hash"]}"'
        put = "/configuration?group=web"
        failure(await client.put(put, content="a: [", headers=text), 400, "bad_configuration")
        failure(await client.get(put), 404, "not_found")
        stale = {**text, "If-Match": '"7"'}
        failure(await client.put("/configuration", content="a: 2\n", headers=stale), 409, "conflict")
        failure(await client.put("/configuration?tenant=nobody", content="a: 2\n", headers=text), 404, "not_found")

    run(test)


def test_agents_tokens_are_refused_here(run: Callable[..., None]) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        assert box.comms is not None
        made = (await client.post("/agents", json={"name": "one"})).json()
        token, _ = await box.comms.login.login(made["uuid"], made["key"], peer="127.0.0.1")
        headers = {"Authorization": f"Bearer {token}"}
        failure(await client.get("/commands", headers=headers), 401, "unauthorized")
        failure(await client.put("/upgrades/a.wpk", content=b"x", headers=headers), 401, "unauthorized")
        failure(await client.put("/configuration", content=b"a: 1", headers=headers), 401, "unauthorized")

    run(test)


def test_a_box_without_comms_says_so(run: Callable[..., None]) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        assert (box.ready()["comms"], box.ready()["comms_socket"]) == (None, None)
        for path in ("/upgrades", "/agents", "/commands", "/configuration", "/groups"):
            assert "--no-comms" in failure(await client.get(path), 404, "no_comms")
        failure(await client.put("/upgrades/a.wpk", content=b"x"), 404, "no_comms")

    run(test, comms=None)


def test_the_metrics_tell_of_agents_and_events(run: Callable[..., None]) -> None:
    async def test(box: Box, client: httpx.AsyncClient) -> None:
        import ssl

        made = (await client.post("/agents", json={"name": "one"})).json()
        tls = ssl.create_default_context(cafile=box.ready()["ca"])
        async with httpx.AsyncClient(verify=tls, base_url=box.ready()["comms"], trust_env=False) as agent:
            body = {"uuid": made["uuid"], "password": made["key"]}
            token = (await agent.post("/login", json=body)).json()["token"]
            headers = {"Authorization": f"Bearer {token}"}
            await agent.post("/events/stateless", headers=headers, json=[{"a": 1}, {"a": 2}])
            await agent.get("/commands?wait=0", headers=headers)
            await agent.get("/nope")
        told = (await client.get(f"{box.operator_url}/metrics")).text.splitlines()
        for line in (
            'osqbox_comms_requests_total{operation="commands",status="408"} 1',
            'osqbox_comms_requests_total{operation="login",status="200"} 1',
            'osqbox_comms_requests_total{operation="unknown",status="404"} 1',
            "osqbox_comms_events_accepted_total 2",
            'osqbox_comms_listeners{kind="stream"} 0',
            "osqbox_comms_indexer_up 1",
            'osqbox_listener_open_connections{listener="comms_socket"} 0',
        ):
            assert line in told
        statistics = (await client.get("/info")).json()["statistics"]
        assert statistics["comms_api"]["intake"]["accepted"] == 2
        assert statistics["comms"]["requests"] == 4

    run(test)
