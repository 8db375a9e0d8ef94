"""The composition root: one nursery that opens identity, store, listeners and systems, and closes them in order.

identity ─▶ store ─▶ tenants, config files ─▶ listeners bound ─▶ ready
stop: held reads answered ─▶ listeners drained ─▶ sightings written ─▶ store closed
"""

from __future__ import annotations

import logging
import os
import secrets
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import trio

from osqbox import __version__, audit, tenants
from osqbox.certs import ensure_identity, revoked_serials
from osqbox.clock import Clock, SystemClock, rfc3339
from osqbox.comms.front import Comms, open_comms
from osqbox.comms.protocol import SMALL_BYTES
from osqbox.comms.sqlite import MIGRATIONS as COMMS_MIGRATIONS
from osqbox.door import Door
from osqbox.errors import BadSetup, Unsafe, UserError
from osqbox.exchange import Peer
from osqbox.feed import Feed
from osqbox.flagfile import flagfile
from osqbox.forward.tables import migrations as forward_migrations
from osqbox.identity import Identity, Snapshot, snapshot
from osqbox.jobs.access import caller_of
from osqbox.jobs.errors import JobError
from osqbox.jobs.front import JobsFront, jobs_limits
from osqbox.jobs.login import migrations as login_migrations
from osqbox.jobs.messages import Caller
from osqbox.jobs.output import pieces
from osqbox.jobs.routes import CertificateApi
from osqbox.jobs.runner import JobRunner, open_runner
from osqbox.jobs.tables import migrations as job_migrations
from osqbox.jobs.users import unix_facts
from osqbox.listen import (
    ASGIApp,
    Limits,
    Listener,
    agents_asgi,
    current_peer,
    refusal_of_certificate,
    rotate_certificate,
    server_context,
)
from osqbox.operator.app import Parts, make_app
from osqbox.operator.upgrades import is_upload
from osqbox.osquery import nodes
from osqbox.osquery.launcher import LauncherApi
from osqbox.osquery.presence import Presence
from osqbox.osquery.routes import OsqueryApi
from osqbox.osquery.tables import migrations as osquery_migrations
from osqbox.osquery.upkeep import Upkeep, load_config_files
from osqbox.refusals import Refusals
from osqbox.running import write_private
from osqbox.settings import MIB, Settings
from osqbox.shell_frames import AGENT_FRAME_BYTES, KIB, VIEWER_FRAME_BYTES
from osqbox.shells.broker import Broker, open_broker
from osqbox.shells.messages import ShellBounds
from osqbox.shells.routes import ShellsApi
from osqbox.shells.tables import migrations as shell_migrations
from osqbox.store import Store, Tx, drops

if TYPE_CHECKING:
    from osqbox.forward.forwarding import Forwarding
    from osqbox.forward.messages import SinkSpec

log = logging.getLogger(__name__)

MIGRATIONS = (
    tenants.migrations,
    audit.migrations,
    osquery_migrations,
    login_migrations,
    job_migrations,
    shell_migrations,
    *COMMS_MIGRATIONS,
    forward_migrations,
)
COMMS_PING_S = 25.0
"""Of agents' WebSockets: proxies cut what is silent for 29 to 60 s."""
COMMS_SOCKET = "comms.sock"
"""Beside the database."""
EVENTS_INDEX_PREFIX = "osqbox"
"""Of the index ``osqbox-events`` in the indexer, beside the indices of the fleet."""
IDENTITY_POLL_S = 0.5
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
ANYWHERE = frozenset(("0.0.0.0", "::"))  # noqa: S104 - compared, not bound
TLS_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}


def new_id() -> str:
    """Identifies a node or a campaign; short enough to type."""
    return secrets.token_hex(6)


def new_document_id() -> str:
    """Identifies a command or a stateless event among those of all boxes that share an indexer."""
    return secrets.token_hex(12)


def new_key() -> str:
    """A secret nobody can guess: node keys, carve sessions, tokens, enroll secrets."""
    return secrets.token_urlsafe(24)


@dataclass(eq=False)
class Box:
    """One running box. `stop` asks it to end; `wait_stopping` tells when somebody has."""

    settings: Settings
    clock: Clock
    identity: Identity
    store: Store
    feed: Feed
    presence: Presence
    osquery: OsqueryApi
    job_runner: JobRunner | None
    broker: Broker | None
    comms: Comms | None
    forwarding: Forwarding | None
    token: str
    enroll_secret: str
    started_at: float
    is_ready: bool = False
    stopping: trio.Event = field(default_factory=trio.Event)
    agents: Listener = field(init=False)
    operator: Listener = field(init=False)
    jobs: Listener | None = None
    agent_comms: Listener | None = None
    publishers: Listener | None = None
    """The unix socket of the comms API."""
    tls_contexts: list[ssl.SSLContext] = field(default_factory=list)
    """Of the listeners with TLS: their certificates are rotated live."""
    refusals: Refusals = field(init=False)
    _revoked: frozenset[int] = field(init=False)
    _identity_seen: Snapshot = field(init=False)

    def __post_init__(self) -> None:
        self.refusals = Refusals(self.store)
        self._identity_seen = snapshot(self.identity)
        self._revoked = revoked_serials(self.identity) if self.identity.crl else frozenset()

    def stop(self) -> None:
        """Ask the box to drain and end; may be called again."""
        self.stopping.set()
        self.presence.stop()

    @property
    def listeners(self) -> list[Listener]:
        return [
            self.agents,
            self.operator,
            *(each for each in (self.jobs, self.agent_comms, self.publishers) if each is not None),
        ]

    def close_ports(self) -> None:
        """Free the ports at once; a host process may go on for long without this box."""
        for listener in self.listeners:
            listener.stop_accepting()

    def why_refused(self, peer: Peer) -> str | None:
        """Asked for every connection and request, and of every open connection at each look at the identity."""
        return refusal_of_certificate(peer, self._revoked, self.clock.now())

    async def watch_identity(self) -> None:
        """Take over renewed certificates and new revocations without a restart; end what they no longer allow."""
        while True:
            await trio.sleep(IDENTITY_POLL_S)
            now = snapshot(self.identity)
            if now != self._identity_seen:
                self._identity_seen = now
                await self._reload_identity()
            for listener in self.listeners:
                listener.recheck()

    async def _reload_identity(self) -> None:
        """Each part by itself: a key that is newer than its certificate must not keep a revocation waiting."""
        for part in (self._reload_revocations, self._reload_server, self._reload_client_ca):
            try:
                await trio.to_thread.run_sync(part)
            except (UserError, OSError) as error:
                log.warning("certificates kept as they were: %s", error)
        try:
            await self.store.write(lambda tx: tx.emit("certificates_reloaded", revoked=len(self._revoked)))
        except Exception:
            log.exception("the reload of certificates could not be told")  # a full disk must not end the box

    def _reload_revocations(self) -> None:
        if self.identity.crl:
            self._revoked = revoked_serials(self.identity)

    def _reload_server(self) -> None:
        for context in self.tls_contexts:
            rotate_certificate(context, self.identity.server_cert, self.identity.server_key)

    def _reload_client_ca(self) -> None:
        if self.identity.client_ca and self.settings.client_auth != "off":
            for context in self.tls_contexts:
                context.load_verify_locations(self.identity.client_ca)

    def operator_hosts(self) -> frozenset[str]:
        """Values of the Host header that mean this listener."""
        return frozenset(f"{name}:{self.operator.port}" for name in ("localhost", "127.0.0.1", "[::1]"))

    @property
    def agents_url(self) -> str:
        return f"https://{_url_host(self.settings.host)}:{self.agents.port}"

    @property
    def operator_url(self) -> str:
        return f"http://{_url_host(self.settings.operator_host)}:{self.operator.port}"

    @property
    def comms_socket(self) -> Path | None:
        """Where publishers of the comms API connect to."""
        if self.settings.comms is None:
            return None
        return self.settings.comms.socket or self.settings.data_dir / COMMS_SOCKET

    def ready(self) -> dict[str, Any]:
        """The ready object (the design's public surface); None is what does not run."""
        return {
            "event": "ready",
            "pid": os.getpid(),
            "version": __version__,
            "data": str(self.settings.data_dir),
            "agents": self.agents_url,
            "operator": self.operator_url,
            "comms": self.agent_comms and f"https://{_url_host(self.settings.host)}:{self.agent_comms.port}",
            "jobs": self.jobs and f"{_url_host(self.settings.host)}:{self.jobs.port}",
            "comms_socket": _text(self.comms_socket),
            "token": self.token,
            "ca": _text(self.identity.ca),
            "client_cert": _text(self.identity.client_cert),
            "client_key": _text(self.identity.client_key),
            "enroll_secret": self.enroll_secret,
            "enroll_secret_file": str(self.settings.data_dir / "enroll_secret"),
            "flagfile": str(self.settings.data_dir / "osquery.flags"),
        }

    def info(self) -> dict[str, Any]:
        """The ready object without its secrets, and what the parts say of themselves."""
        public = {name: value for name, value in self.ready().items() if name not in ("token", "enroll_secret")}
        return {
            **public,
            "started_at": rfc3339(self.started_at),
            "uptime_s": round(self.clock.now() - self.started_at, 3),
            "read_hold_s": self.settings.read_hold_s,
            "statistics": {
                "agents": msgspec.to_builtins(self.agents.statistics()),
                "operator": msgspec.to_builtins(self.operator.statistics()),
                **({"jobs": msgspec.to_builtins(self.jobs.statistics())} if self.jobs else {}),
                **({"comms": msgspec.to_builtins(self.agent_comms.statistics())} if self.agent_comms else {}),
                **({"comms_socket": msgspec.to_builtins(self.publishers.statistics())} if self.publishers else {}),
                "store": msgspec.to_builtins(self.store.statistics()),
                "feed": msgspec.to_builtins(self.feed.statistics()),
                "presence": msgspec.to_builtins(self.presence.statistics()),
                "osquery": self.osquery.statistics(),
                **({"job_runner": msgspec.to_builtins(self.job_runner.statistics())} if self.job_runner else {}),
                **({"shells": msgspec.to_builtins(self.broker.statistics())} if self.broker else {}),
                **({"comms_api": self.comms.statistics()} if self.comms else {}),
                **({"forwarding": msgspec.to_builtins(self.forwarding.statistics())} if self.forwarding else {}),
            },
            "drops": self.store.peek(drops),
            "limits": {
                "retention": msgspec.to_builtins(self.settings.retention),
                "bounds": msgspec.to_builtins(self.settings.bounds),
            },
        }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _url_host(host: str) -> str:
    if host in ANYWHERE:
        return "localhost"
    return f"[{host}]" if ":" in host else host


@asynccontextmanager
async def open_box(settings: Settings, *, clock: Clock | None = None) -> AsyncIterator[Box]:
    """A box that is ready inside the block and gone after it.

    Raises UserError when it cannot start, possibly inside an exception group.
    """
    clock = clock or SystemClock()
    _check_exposure(settings)
    identity = await trio.to_thread.run_sync(open_identity, settings, clock.now())
    async with _open_store(settings, clock) as store:
        files = await load_config_files(store, settings.config_files)
        async with (
            _open_forwarding(settings, clock, store) as forwarding,
            _open_job_runner(settings, clock, store) as job_runner,
            _open_broker(settings, clock, store) as broker,
            _open_comms(settings, clock, store) as comms,
        ):
            box = await _assemble(settings, clock, identity, store, job_runner, broker, comms, forwarding)
            upkeep = Upkeep(store, box.presence, box.osquery, clock, settings.retention, files)
            try:
                async with _serving(box, upkeep):
                    yield box
            finally:
                box.close_ports()


def open_identity(settings: Settings, now: float) -> Identity:
    """The certificates and the default enroll secret: ours, the user's own, or both mixed. Raises BadSetup."""
    names = () if settings.host in LOOPBACK | ANYWHERE else (settings.host,)
    ours = ensure_identity(settings.certs_dir, names=names, key_type=settings.key_type, now=now)
    if settings.tls_cert is None and settings.tls_key is None and settings.client_ca is None:
        return ours
    if settings.tls_cert is None or settings.tls_key is None:
        if settings.tls_cert or settings.tls_key:
            raise BadSetup("expected --tls-cert and --tls-key together, got one of them")
        return Identity.from_own(ours.server_cert, ours.server_key, settings.client_ca, now=now, base=ours)
    return Identity.from_own(settings.tls_cert, settings.tls_key, settings.client_ca, now=now, base=ours)


def _check_exposure(settings: Settings) -> None:
    if settings.operator_host not in LOOPBACK:
        raise Unsafe(
            f"the operator listener speaks plain HTTP and carries a token: expected a loopback address, "
            f"got {settings.operator_host!r}",
            hint="ssh -L 8080:127.0.0.1:8080 HOST, and leave --operator-host alone",
        )
    if settings.comms and settings.comms.indexer_url is not None:
        from osqbox.comms.opensearch.client import check_url

        check_url(settings.comms.indexer_url, has_password=settings.comms.indexer_auth_file is not None)


@asynccontextmanager
async def _open_store(settings: Settings, clock: Clock) -> AsyncIterator[Store]:
    store = Store.open(settings.data_dir / "osqbox.db", MIGRATIONS, clock, Feed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.writer)
        try:
            yield store
        finally:
            await store.aclose()


@asynccontextmanager
async def _open_job_runner(settings: Settings, clock: Clock, store: Store) -> AsyncIterator[JobRunner | None]:
    """Jobs outlive the box, unless its data directory does not."""
    if settings.jobs is None:
        yield None
        return
    directory = settings.data_dir / "jobs"
    unix = unix_facts(settings.jobs.user)
    async with open_runner(store, directory, clock, unix=unix, stop_jobs=settings.ephemeral) as runner:
        yield runner


@asynccontextmanager
async def _open_broker(settings: Settings, clock: Clock, store: Store) -> AsyncIterator[Broker | None]:
    if settings.shells is None:
        yield None
        return
    bounds = ShellBounds(hold_s=settings.read_hold_s, idle_s=settings.shells.idle_s, max_s=settings.shells.max_s)
    async with open_broker(store, settings.data_dir / "shells", clock, bounds, new_id=new_id) as broker:
        yield broker


@asynccontextmanager
async def _open_forwarding(settings: Settings, clock: Clock, store: Store) -> AsyncIterator[Forwarding | None]:
    """Around everything that records, so that it can forward what they write last."""
    sinks = [*settings.forward, *_indexer_sink(settings)]
    if not sinks:
        yield None
        return
    from osqbox.forward.forwarding import open_forwarding

    jobs = settings.data_dir / "jobs"
    async with open_forwarding(
        store, sinks, clock, read_output=lambda job, *place: pieces(jobs / job, *place)
    ) as forwarding:
        yield forwarding


def _indexer_sink(settings: Settings) -> Iterator[SinkSpec]:
    """Stateless events that the box keeps go on into the indexer, too, unless ``--forward`` takes them there."""
    comms = settings.comms
    if comms is None or comms.indexer_url is None or comms.engine_socket is not None:
        return
    from osqbox.forward.messages import SourceName, parse_sink

    sink = parse_sink(
        f"opensearch+{comms.indexer_url.rstrip('/')}/{EVENTS_INDEX_PREFIX}",
        directory=settings.data_dir,
        sources=[SourceName.EVENTS],
        ca_file=comms.indexer_ca,
        auth_file=comms.indexer_auth_file,
    )
    if all(sink.name != each.name for each in settings.forward):
        yield sink


@asynccontextmanager
async def _open_comms(settings: Settings, clock: Clock, store: Store) -> AsyncIterator[Comms | None]:
    if settings.comms is None:
        yield None
        return
    async with open_comms(
        settings.comms, settings.retention, store, clock,
        data_dir=settings.data_dir, certs_dir=settings.certs_dir, new_id=new_document_id,
    ) as comms:  # fmt: skip
        yield comms


async def _assemble(
    settings: Settings,
    clock: Clock,
    identity: Identity,
    store: Store,
    job_runner: JobRunner | None,
    broker: Broker | None,
    comms: Comms | None,
    forwarding: Forwarding | None,
) -> Box:
    """Everything bound and prepared, nothing serving yet."""
    secret = settings.enroll_secret or identity.enroll_secret()
    await store.write(lambda tx: _prepare_default_tenant(tx, settings, secret))
    presence = Presence()
    presence.load(store.peek(nodes.sightings))
    osquery = OsqueryApi(
        store, presence, clock, settings.bounds, read_hold_s=settings.read_hold_s, new_key=new_key, new_id=new_id
    )
    token = settings.token or new_key()
    box = Box(
        settings, clock, identity, store, store.feed, presence, osquery, job_runner, broker, comms, forwarding, token,
        secret, clock.now(),
    )  # fmt: skip
    box.agents = _agents_listener(box)
    box.operator = _operator_listener(box)
    try:
        await box.agents.bind(settings.host, settings.agents_port)
        await box.operator.bind(settings.operator_host, settings.operator_port)
        if settings.jobs and job_runner:
            box.jobs = _jobs_listener(box, job_runner)
            await box.jobs.bind(settings.jobs.host, settings.jobs.port)
        if settings.comms and comms and box.comms_socket:
            box.agent_comms = _comms_listener(box, comms)
            await box.agent_comms.bind(settings.host, settings.comms.port)
            box.publishers = Listener("comms_socket", handler=comms.publishers)
            box.publishers.bind_unix(box.comms_socket)
        _write_handouts(box)
    except BaseException:
        box.close_ports()
        raise
    return box


def _prepare_default_tenant(tx: Tx, settings: Settings, secret: str) -> None:
    options = tenants.TenantOptions(
        open=settings.open_tenant, approve=settings.approve, client_cert=settings.cert_enrollment
    )
    before = tenants.find(tx.db, tenants.DEFAULT)
    if before is None:
        tenants.create(tx, tenants.DEFAULT, options)
    elif (settings.open_tenant, settings.approve, settings.cert_enrollment) != (False, False, False):
        merged = msgspec.structs.replace(
            before.options,
            open=before.options.open or options.open,
            approve=before.options.approve or options.approve,
            client_cert=before.options.client_cert or options.client_cert,
        )
        tenants.change(tx, tenants.DEFAULT, merged)
    if tenants.find_secret(tx.db, [secret]) is None:
        tenants.add_secret(tx, tenants.DEFAULT, secret, label="from the start of the box")


def _agents_listener(box: Box) -> Listener:
    settings, identity = box.settings, box.identity
    minimum = TLS_VERSIONS.get(settings.agents_tls_min)
    if minimum is None:
        raise BadSetup(f"--agents-tls-min: expected one of {', '.join(TLS_VERSIONS)}, got {settings.agents_tls_min}")
    context = server_context(
        identity.server_cert,
        identity.server_key,
        client_ca_file=identity.client_ca,
        client_auth=settings.client_auth,
        minimum=minimum,
    )
    box.tls_contexts.append(context)
    shells = ShellsApi(box.broker, partial(_shell_node, box.osquery)) if box.broker else None
    handler = Door(
        box.osquery, LauncherApi(box.osquery, settings.bounds), _certificates(box), *([shells] if shells else [])
    )
    return Listener(
        "agents",
        ssl_context=context,
        handler=handler,
        app=agents_asgi(handler, websocket_app=cast("ASGIApp", shells.join)) if shells else None,
        limits=Limits(websocket_message_bytes=AGENT_FRAME_BYTES + KIB),
        on_event=box.osquery.count_refused,
        check_peer=box.why_refused,
        on_refused_peer=partial(box.refusals.note, "agents"),
    )


def _shell_node(osquery: OsqueryApi, node_key: str, peer: Peer) -> tuple[str, str, str]:
    node = osquery.authenticate(node_key, peer)
    return node.id, node.tenant, node.hostname


def _certificates(box: Box) -> CertificateApi:
    identity = box.identity
    directory = identity.directory if identity.client_ca_key else None
    return CertificateApi(
        box.store,
        box.clock,
        directory,
        ca=lambda: identity.ca.read_bytes() if identity.ca else b"",
        jobs=lambda: box.ready()["jobs"],
    )


def _jobs_listener(box: Box, runner: JobRunner) -> Listener:
    """TLS 1.3 alone, and nobody without a certificate of the client CA."""
    identity = box.identity
    context = server_context(
        identity.server_cert,
        identity.server_key,
        client_ca_file=identity.client_ca,
        client_auth="required",
        minimum=ssl.TLSVersion.TLSv1_3,
        resumption=False,
    )
    box.tls_contexts.append(context)
    return Listener(
        "jobs",
        ssl_context=context,
        app=cast("ASGIApp", JobsFront(runner, caller=partial(_caller, box), stopping=box.stopping)),
        limits=jobs_limits(),
        check_peer=box.why_refused,
        on_refused_peer=partial(box.refusals.note, "jobs"),
    )


def _comms_listener(box: Box, comms: Comms) -> Listener:
    identity = box.identity
    context = server_context(
        identity.server_cert,
        identity.server_key,
        client_ca_file=identity.client_ca,
        client_auth=box.settings.client_auth,
        minimum=ssl.TLSVersion.TLSv1_2,
    )
    box.tls_contexts.append(context)
    return Listener(
        "comms",
        ssl_context=context,
        handler=comms.api,
        app=agents_asgi(comms.api, websocket_app=cast("ASGIApp", comms.api.websocket)),
        limits=Limits(
            websocket_message_bytes=SMALL_BYTES,
            websocket_ping_s=COMMS_PING_S,
            vanished_after_s=60,
            unacknowledged_after_s=60,
        ),
        check_peer=box.why_refused,
        on_refused_peer=partial(box.refusals.note, "comms"),
    )


def _caller(box: Box) -> Caller:
    """Whose certificate the current request came with; JobError, and a row in the audit, if it is nobody's."""
    peer = current_peer()
    assert peer is not None
    try:
        return caller_of(peer)
    except JobError as error:
        box.refusals.note("jobs", peer, error.reason)
        raise


def _operator_listener(box: Box) -> Listener:
    parts = Parts(
        store=box.store,
        feed=box.feed,
        clock=box.clock,
        presence=box.presence,
        osquery=box.osquery,
        token=box.token,
        info=box.info,
        ready=lambda: box.is_ready,
        stop=box.stop,
        stopping=box.stopping,
        allowed_hosts=box.operator_hosts,
        new_id=new_id,
        new_key=new_key,
        shells=box.broker,
        record_shells=box.settings.shells is None or box.settings.shells.record,
        jobs=box.job_runner,
        comms=box.comms,
        identity=box.identity,
    )
    limits = Limits(app_body_bytes=17 * MIB, websocket_message_bytes=VIEWER_FRAME_BYTES + KIB, vanished_after_s=30)
    # Hypercorn's own types name more kinds of messages than ASGI has; ours say only that they are mappings.
    # The app's own limit is lower, and answers in the API's words.
    return Listener("operator", app=cast("ASGIApp", make_app(parts)), limits=limits, streams_body=is_upload)


def _write_handouts(box: Box) -> None:
    """Files that a user points other programs to: the flag file and the secret it names."""
    ready = box.ready()
    write_private(Path(ready["enroll_secret_file"]), box.enroll_secret + "\n")
    write_private(Path(ready["flagfile"]), flagfile(ready))


@asynccontextmanager
async def _serving(box: Box, upkeep: Upkeep) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.run)
        nursery.start_soon(box.watch_identity)
        nursery.start_soon(box.refusals.run)
        for listener in box.listeners:
            await nursery.start(listener.run)
        box.is_ready = True
        try:
            yield
        finally:
            box.is_ready = False
            box.stop()
            with trio.CancelScope(shield=True):
                if box.broker:
                    await box.broker.stop()  # while there is still somebody to carry its goodbyes
                if box.comms:
                    box.comms.hub.stop()
                async with trio.open_nursery() as draining:
                    for listener in box.listeners:
                        draining.start_soon(listener.drain)
                try:
                    await upkeep.flush()
                except Exception:
                    log.exception("the last sightings were not written")  # a full disk must not fail the end
            nursery.cancel_scope.cancel()
