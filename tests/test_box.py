"""The box as a whole: it opens everything or nothing, follows its certificates while it runs, and ends cleanly."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import ssl
import stat
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox import box as box_module
from osqbox import tenants
from osqbox.box import Box, open_box
from osqbox.certs import ensure_identity, issue_client, renew, revoke
from osqbox.errors import AddressInUse, BadSetup, Unsafe, UserError
from osqbox.feed import Event
from osqbox.osquery import nodes
from osqbox.osquery.nodes import Selector
from osqbox.running import locked_data_dir
from osqbox.settings import Settings
from osqbox.tenants import TenantOptions

HOST = {"host_identifier": "web-1", "platform_type": "9"}


@pytest.fixture(scope="session")
def session_certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An identity for the tests that do not change it."""
    directory = tmp_path_factory.mktemp("box-certs")
    ensure_identity(directory, now=time.time())
    return directory


def settings(tmp_path: Path, certs: Path, **more: Any) -> Settings:
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    return Settings(data, certs, agents_port=0, operator_port=0, **more)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await test()

    trio.run(main)


def first(error: BaseException) -> BaseException:
    """The one exception inside nested groups."""
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return error


async def fails(wanted: type[UserError], **changes: Any) -> UserError:
    """The error with which a box does not start."""
    try:
        async with open_box(Settings(**changes)):
            raise AssertionError("the box started")
    except* wanted as group:
        error = first(group)
    assert isinstance(error, wanted)
    return error


class Client:
    """An HTTP client in a thread, on one connection as long as that lasts."""

    def __init__(self, connection: http.client.HTTPConnection, token: str | None = None) -> None:
        self._connection = connection
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def ask(self, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
        """Status and decoded answer; raises OSError or HTTPException."""
        return await trio.to_thread.run_sync(self._ask, path, body, method)

    def _ask(self, path: str, body: Any, method: str) -> tuple[int, Any]:
        raw = None if body is None else json.dumps(body)
        self._connection.request(method, path, raw, self._headers)
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    async def tell(self, path: str, body: Any) -> Any:
        return (await self.ask(path, body))[1]

    async def get(self, path: str) -> tuple[int, Any]:
        return await self.ask(path, method="GET")


@contextmanager
def agent(box: Box, certificate: tuple[Any, Any] | None = None) -> Iterator[Client]:
    context = ssl.create_default_context(cafile=box.ready()["ca"])
    if certificate:
        context.load_cert_chain(*certificate)
    connection = http.client.HTTPSConnection("localhost", box.agents.port, context=context, timeout=20)
    with closing(connection):
        yield Client(connection)


@contextmanager
def operator(box: Box) -> Iterator[Client]:
    connection = http.client.HTTPConnection("127.0.0.1", box.operator.port, timeout=20)
    with closing(connection):
        yield Client(connection, box.token)


def refuses_connections(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0


# a life


def test_a_box_is_ready_inside_its_block_and_gone_after_it(tmp_path: Path, session_certs: Path) -> None:
    async def test() -> None:
        async with open_box(settings(tmp_path, session_certs)) as box:
            assert box.is_ready
            ready = box.ready()
            with agent(box) as client, operator(box) as person:
                enrolled = await client.tell("/enroll", {**HOST, "enroll_secret": ready["enroll_secret"]})
                assert await client.tell("/config", {"node_key": enrolled["node_key"]}) == {}
                assert (await person.get("/readyz"))[0] == 200
                _, (listed,) = await person.get("/api/v1/nodes")
                assert listed["host_identifier"] == "web-1"
        assert not box.is_ready
        assert box.agents.statistics().open_connections == box.operator.statistics().open_connections == 0
        assert refuses_connections(ready["agents"])
        assert refuses_connections(ready["operator"])
        left = sorted(path.name for path in (tmp_path / "data").iterdir())
        assert left == ["enroll_secret", "osqbox.db", "osquery.flags"], "the write-ahead log is folded in"

    run(test)


def check_files(ready: dict[str, Any]) -> None:
    for name in ("ca", "client_cert", "client_key", "flagfile", "enroll_secret_file"):
        assert Path(ready[name]).is_file()
    for name in ("flagfile", "enroll_secret_file"):
        assert stat.S_IMODE(Path(ready[name]).stat().st_mode) == 0o600
    assert Path(ready["enroll_secret_file"]).read_text().strip() == ready["enroll_secret"]


def test_the_ready_object_names_everything(tmp_path: Path, session_certs: Path) -> None:
    async def test() -> None:
        async with open_box(settings(tmp_path, session_certs)) as box:
            ready = box.ready()
            assert {"pid", "version", "data", "agents", "operator", "comms", "jobs", "comms_socket", "token", "ca",
                    "client_cert", "client_key", "enroll_secret", "flagfile"} <= ready.keys()  # fmt: skip
            assert ready["comms"] is ready["jobs"] is ready["comms_socket"] is None
            check_files(ready)
            info = json.dumps(box.info())
            assert ready["token"] not in info
            assert ready["enroll_secret"] not in info
            assert box.info()["limits"]["retention"]["log_bytes"] == 4 << 30

    run(test)


def test_what_a_box_knew_it_knows_again(tmp_path: Path, session_certs: Path) -> None:
    """Keys, sightings and the default tenant outlive a restart; the secret is not added twice."""

    async def test() -> None:
        async with open_box(settings(tmp_path, session_certs)) as box:
            with agent(box) as client:
                key = (await client.tell("/enroll", {**HOST, "enroll_secret": box.enroll_secret}))["node_key"]
                await box.store.write(lambda tx: tx.db.execute("UPDATE osquery_nodes SET last_seen_at = 1"))
                await client.tell("/config", {"node_key": key})
        async with open_box(settings(tmp_path, session_certs)) as box:
            with agent(box) as client:
                (seen,) = box.store.peek(nodes.sightings)
                assert seen[1] > 1, "written at the stop"
                assert box.presence.seen() == {seen[0]: seen[1]}
                assert await client.tell("/config", {"node_key": key}) == {}
                assert len(box.store.peek(lambda db: tenants.secrets_of(db, "default"))) == 1

    run(test)


@pytest.mark.parametrize("asked", [True, False])
def test_a_held_read_does_not_hold_up_the_stop(tmp_path: Path, session_certs: Path, asked: bool) -> None:
    """Whether somebody asks the box to stop or its block just ends."""

    async def test() -> None:
        answers: list[Any] = []

        async def read(box: Box) -> None:
            with agent(box) as client:
                key = (await client.tell("/enroll", {**HOST, "enroll_secret": box.enroll_secret}))["node_key"]
                answers.append(await client.tell("/distributed/read", {"node_key": key}))

        async with trio.open_nursery() as nursery:
            async with open_box(settings(tmp_path, session_certs)) as box:
                nursery.start_soon(read, box)
                while not box.presence.statistics().reads_held:
                    await trio.sleep(0.001)
                started = trio.current_time()
                if asked:
                    box.stop()
            assert box.stopping.is_set()
            assert trio.current_time() - started < 2
        assert answers == [{"queries": {}, "node_invalid": False}]

    run(test)


def test_a_box_whose_user_fails_still_ends_cleanly(tmp_path: Path, session_certs: Path) -> None:
    """The error comes out, and everything acknowledged is in the file."""

    async def test() -> None:
        ended: list[str] = []
        try:
            async with open_box(settings(tmp_path, session_certs)) as box:
                await box.store.write(lambda tx: tenants.create(tx, "acme", TenantOptions()))
                raise LookupError("the user's own")
        except* LookupError as group:
            ended.append(str(first(group)))
        assert ended == ["the user's own"]
        async with open_box(settings(tmp_path, session_certs)) as again:
            assert again.store.peek(lambda db: tenants.get(db, "acme"))

    run(test)


def test_a_cancelled_box_ends_cleanly(tmp_path: Path, session_certs: Path) -> None:
    async def test() -> None:
        with trio.CancelScope() as scope:
            async with open_box(settings(tmp_path, session_certs)) as box:
                scope.cancel()
                await trio.sleep_forever()
        assert refuses_connections(box.agents_url)
        assert not list((tmp_path / "data").glob("*-wal"))

    run(test)


@pytest.mark.parametrize("delay_ms", [0, 2, 5, 9, 14, 20, 30, 45])
def test_a_box_that_is_cancelled_while_it_opens_leaves_nothing_open(
    tmp_path: Path, session_certs: Path, delay_ms: int
) -> None:
    """At whatever moment; a socket or file left open is an error of this test run."""

    async def test() -> None:
        with trio.move_on_after(delay_ms / 1000):
            async with open_box(settings(tmp_path, session_certs)):
                await trio.sleep_forever()

    run(test)
    gc.collect()


def test_two_boxes_live_side_by_side(tmp_path: Path, session_certs: Path) -> None:
    """As downstream test suites run them."""

    async def test() -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        async with (
            open_box(settings(tmp_path / "a", session_certs)) as one,
            open_box(settings(tmp_path / "b", session_certs)) as other,
        ):
            assert one.agents_url != other.agents_url
            with agent(one) as client:
                await client.tell("/enroll", {**HOST, "enroll_secret": one.enroll_secret})
            assert len(one.store.peek(lambda db: nodes.select(db, Selector()))) == 1
            assert other.store.peek(lambda db: nodes.select(db, Selector())) == []

    run(test)


# not starting


@pytest.mark.parametrize("which", ["agents_port", "operator_port"])
def test_a_taken_port_is_told_and_nothing_is_left_open(tmp_path: Path, session_certs: Path, which: str) -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            free = {"data_dir": tmp_path, "certs_dir": session_certs, "agents_port": 0, "operator_port": 0}
            wanted = {**free, which: port}
            error = await fails(AddressInUse, **wanted)
        assert str(port) in str(error)
        assert error.hint
        async with open_box(Settings(**wanted)):
            pass

    run(test)


def test_a_second_box_on_the_same_data_is_refused(tmp_path: Path, session_certs: Path) -> None:
    async def test() -> None:
        with locked_data_dir(tmp_path / "data"):
            async with open_box(settings(tmp_path, session_certs)):
                with pytest.raises(AddressInUse, match="already runs on"), locked_data_dir(tmp_path / "data"):
                    pass

    run(test)


def test_what_cannot_be_used_is_told_with_something_to_type(tmp_path: Path, session_certs: Path) -> None:
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    (spoiled / "osqbox.db").write_text("no database " * 1000)
    broken = tmp_path / "broken.conf"
    broken.write_text("{")
    good = {"data_dir": tmp_path, "certs_dir": session_certs, "agents_port": 0, "operator_port": 0}

    async def test() -> None:
        for changes, kind, words in (
            ({"data_dir": spoiled}, BadSetup, "osqbox.db"),
            ({"config_files": (broken,)}, BadSetup, "broken.conf:1:2"),
            ({"config_files": (tmp_path / "missing.conf",)}, BadSetup, "missing.conf"),
            ({"operator_host": "0.0.0.0"}, Unsafe, "loopback"),
            ({"tls_cert": broken}, BadSetup, "--tls-key"),
            ({"tls_cert": broken, "tls_key": broken}, BadSetup, "broken.conf"),
            ({"agents_tls_min": "0.9"}, BadSetup, "0.9"),
        ):
            assert words in str(await fails(kind, **{**good, **changes}))

    run(test)


# settings


@pytest.mark.parametrize(
    ("given", "option"),
    [({"approve": True}, "approve"), ({"open_tenant": True}, "open"), ({"cert_enrollment": True}, "client_cert")],
)
def test_the_default_tenant_follows_the_settings(
    tmp_path: Path, session_certs: Path, given: dict[str, Any], option: str
) -> None:
    """Also one that exists; what was set otherwise stays."""

    async def test() -> None:
        async with open_box(settings(tmp_path, session_certs)) as box:
            await box.store.write(lambda tx: tenants.change(tx, "default", TenantOptions(reenroll="refuse")))
        async with open_box(settings(tmp_path, session_certs, **given)) as box:
            options = box.store.peek(lambda db: tenants.get(db, "default")).options
            assert getattr(options, option) is True
            assert options.reenroll == "refuse"

    run(test)


def test_a_secret_and_a_token_may_be_given(tmp_path: Path, session_certs: Path) -> None:
    async def test() -> None:
        async with open_box(settings(tmp_path, session_certs, enroll_secret="mine", token="t0ken")) as box:
            assert (box.ready()["enroll_secret"], box.ready()["token"]) == ("mine", "t0ken")
            with agent(box) as client:
                assert "error" not in await client.tell("/enroll", {**HOST, "enroll_secret": "mine"})

    run(test)


def test_required_client_certificates(tmp_path: Path, session_certs: Path) -> None:
    async def test() -> None:
        async with open_box(settings(tmp_path, session_certs, client_auth="required")) as box:
            ready = box.ready()
            with agent(box) as client, pytest.raises((OSError, http.client.HTTPException)):
                await client.get("/version")
            with agent(box, (ready["client_cert"], ready["client_key"])) as client:
                assert (await client.get("/version"))[0] == 200

    run(test)


# certificates while it runs


def heard(box: Box, kind: str) -> Callable[[], Awaitable[Event]]:
    """Waits for the next event of a kind, counted from this call on."""
    follower = box.feed.subscribe()

    async def wait() -> Event:
        while True:
            event = await follower.next()
            if isinstance(event, Event) and event.kind == kind:
                return event

    return wait


async def serial(box: Box) -> int:
    """Of the certificate a new connection is shown."""
    context = ssl.create_default_context(cafile=box.ready()["ca"])
    stream = await trio.open_ssl_over_tcp_stream("localhost", box.agents.port, ssl_context=context)
    await stream.do_handshake()
    found = int(stream.getpeercert()["serialNumber"], 16)
    await trio.aclose_forcefully(stream)
    return found


def test_a_renewed_certificate_is_served_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open connections live on, clients that trust the CA notice nothing, and it goes on a second time."""
    monkeypatch.setattr(box_module, "IDENTITY_POLL_S", 0.02)

    async def test() -> None:
        certs = tmp_path / "certs"
        async with open_box(settings(tmp_path, certs)) as box:
            with agent(box) as client:
                await client.get("/version")
                seen = [await serial(box)]
                for _ in range(2):
                    reloaded = heard(box, "certificates_reloaded")
                    await trio.to_thread.run_sync(lambda: renew(certs, now=time.time()))
                    while await serial(box) in seen:
                        await reloaded()
                    seen.append(await serial(box))
                assert len(set(seen)) == 3
                assert (await client.get("/version"))[0] == 200
                assert box.agents.statistics().accepted > 1

    run(test)


def test_a_revoked_certificate_ends_its_connections_and_opens_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other certificates are served on."""
    monkeypatch.setattr(box_module, "IDENTITY_POLL_S", 0.02)

    async def test() -> None:
        certs = tmp_path / "certs"
        async with open_box(settings(tmp_path, certs, cert_enrollment=True)) as box:
            stolen, kept = (issue_client(certs, name, now=time.time())[:2] for name in ("stolen", "kept"))
            with agent(box, stolen) as bad, agent(box, kept) as good:
                keys = [(await client.tell("/enroll", HOST))["node_key"] for client in (bad, good)]
                reloaded = heard(box, "certificates_reloaded")
                await trio.to_thread.run_sync(lambda: revoke(certs, "stolen", now=time.time()))
                while (await reloaded()).data["revoked"] < 1:
                    pass
                with pytest.raises((OSError, http.client.HTTPException)):
                    await bad.ask("/config", {"node_key": keys[0]})
                assert await good.tell("/config", {"node_key": keys[1]}) == {}
            with agent(box, stolen) as again, pytest.raises((OSError, http.client.HTTPException)):
                await again.ask("/config", {"node_key": keys[0]})
            assert box.osquery.statistics()["refused"]["certificate_revoked"] >= 2

    run(test)


def test_certificates_that_are_broken_meanwhile_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(box_module, "IDENTITY_POLL_S", 0.02)

    async def test() -> None:
        certs = tmp_path / "certs"
        async with open_box(settings(tmp_path, certs)) as box:
            before = await serial(box)
            reloaded = heard(box, "certificates_reloaded")
            (certs / "server.pem").write_text("nonsense")
            await reloaded()
            assert await serial(box) == before

    run(test)
    assert "certificates kept as they were" in caplog.text
