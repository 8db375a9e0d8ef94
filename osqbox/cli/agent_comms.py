"""``osqbox agent --comms``: this machine or a pretended one as an agent of the comms API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli.output import F
from osqbox.errors import BadSetup, BadUsage, UserError

if TYPE_CHECKING:
    import ssl

    from osqbox.agent.comms.driver import CommsAgent, OnEvent
    from osqbox.agent.comms.hosts import TablesHost
    from osqbox.agent.store import Store
    from osqbox.box import Box
    from osqbox.cli.find import Found

HERE = "here"
_FILE = click.Path(path_type=Path, dir_okay=False)
_ONLY = ("comms_profile", "comms_transport", "comms_speed", "uuid", "key_file")
_OSQUERY_ONLY = ("tls_hostname", "instances", "control", "osqueryd", "in_process", "shared_client", "root")

TOLD = {
    "logged_in": "logged in as {uuid}",
    "stream_open": "commands by {transport}, after {after}",
    "command": "command {name} ({id}): result {code}, {message}",
    "configuration": "configuration of {group}: {bytes} bytes, sha256 {sha256}",
    "upgrade": "fetched {file_name}: {bytes} bytes, sha256 {sha256}",
    "bye": "the server ended the stream: {reason}",
    "restart": "restarting, as command {command} says",
}


class RefusedAgent(UserError):
    """The server does not know this agent."""


def comms_options(function: F) -> F:
    for option in reversed(
        (
            click.option("--comms", is_flag=False, flag_value=HERE, metavar="[URL]",
                         help="An agent of the comms API instead. Default: of the box that runs here."),
            click.option("--comms-profile", type=click.Choice(["spike", "g1"]),
                         help="Which dialect: the design spike's (default), or that of the C++ agent of 2024-25."),
            click.option("--comms-transport", type=click.Choice(["sse", "ws", "poll"]),
                         help="How commands come. Default: sse; g1 polls."),
            click.option("--comms-speed", type=click.FloatRange(0, min_open=True), metavar="FACTOR",
                         help="Its waits between requests are so many times shorter."),
            click.option("--uuid", metavar="UUID", help="A registered agent's id, with --key-file."),
            click.option("--key-file", type=_FILE, metavar="FILE", help="Its key; else it registers itself."),
        )
    ):  # fmt: skip
        function = option(function)
    return function


def refuse_without_comms(options: Mapping[str, Any]) -> None:
    for name in _ONLY:
        if options[name] is not None:
            raise BadUsage(f"--{name.replace('_', '-')} goes with --comms", hint="osqbox agent --comms")


def run_comms(options: Mapping[str, Any], told: Callable[[str, dict[str, Any]], None], until_signal: Any) -> int:
    """Until Ctrl-C. Raises UserError."""
    for name in _OSQUERY_ONLY:
        if options.get(name):
            raise BadUsage(f"--{name.replace('_', '-')} goes without --comms: it is for osquery agents")
    if bool(options["uuid"]) != bool(options["key_file"]):
        raise BadUsage("expected --uuid and --key-file together, got one of them")
    url, ca, secret = _server(options)
    result: int = until_signal(lambda: _live(options, url, ca, secret, told))
    return result


def comms_url(ready: Mapping[str, Any]) -> str:
    """Of a running box. Raises BadSetup when it has no comms listener."""
    url = ready.get("comms")
    if not url:
        raise BadSetup("that box has no comms listener", hint="osqbox serve --comms-port 27000")
    return str(url)


def _server(options: Mapping[str, Any]) -> tuple[str, Path | None, str]:
    """URL, CA and enroll secret."""
    url, ca, secret = options["comms"], options["ca"], options["enroll_secret"] or ""
    if url != HERE:
        return url, ca, secret
    from osqbox.cli.find import find_box

    found: Found = find_box()
    ready = found.ready
    return comms_url(ready), ca or Path(ready["ca"]), secret or str(ready.get("enroll_secret") or "")


async def _live(
    options: Mapping[str, Any], url: str, ca: Path | None, secret: str, told: Callable[[str, dict[str, Any]], None]
) -> None:
    from osqbox.agent.comms.core import RefusedByServer
    from osqbox.agent.store import FileStore, MemoryStore
    from osqbox.agent.wire import client_context

    store: Store = FileStore(options["state"] / "comms") if options["state"] else MemoryStore()
    try:
        agent = _agent(options, url, client_context(ca, options["client_cert"], options["client_key"]), store, told)
        await _identify(agent, options, secret)
        await agent.run()
    except RefusedByServer as error:
        raise RefusedAgent(str(error), hint="osqbox comms agents list") from error
    finally:
        store.close()


def _agent(options: Mapping[str, Any], url: str, tls: ssl.SSLContext, store: Store, told: OnEvent) -> CommsAgent:
    import random

    from osqbox.agent.comms.driver import CommsAgent
    from osqbox.agent.comms.options import G1, SPIKE, Options, Pace
    from osqbox.agent.comms.wire import Target

    profile = options["comms_profile"] or SPIKE
    transport = options["comms_transport"] or ("poll" if profile == G1 else "sse")
    if profile == G1 and transport != "poll":
        raise BadUsage(f"a g1 agent polls for commands, got --comms-transport {transport}")
    pace = Pace().times_faster(options["comms_speed"] or 1.0)
    return CommsAgent(
        Target(url),
        tls,
        _host(options),
        Options(profile, transport, pace, keep_configuration=bool(options["state"])),
        store,
        now=time.time,
        throw=random.random,
        on_event=told,
    )


def _host(options: Mapping[str, Any]) -> TablesHost:
    from osqbox.agent.comms.hosts import TablesHost, ThisMachine
    from osqbox.agent.sql import Engine

    if options["profile"]:
        from osqbox.agent.profile import load_profile

        profile = load_profile(options["profile"])
        host = profile.host(seed=options["seed"], index=options["index"])
        return TablesHost(host.tables(time.time), Engine(schema=profile.schema))
    from osqbox.agent.host import host_tables

    return ThisMachine(host_tables(now=time.time), Engine())


async def _identify(agent: CommsAgent, options: Mapping[str, Any], secret: str) -> None:
    """As it is told, as its state says, or by registering itself."""
    if options["uuid"]:
        agent.core.identify(options["uuid"], _key(options["key_file"]))
    elif not agent.core.uuid:
        if not secret:
            raise BadUsage(
                "an enroll secret, or --uuid with --key-file, is needed", hint="osqbox comms agents add NAME"
            )
        await agent.enroll(*new_identity(), secret)


def _key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"cannot read the key in {path}: {error}", hint="osqbox comms agents key UUID") from error


def new_identity() -> tuple[str, str]:
    """A uuid, and a key of 32 alphanumerics."""
    import secrets
    import uuid

    return str(uuid.uuid4()), secrets.token_hex(16)


async def run_demo_agent(box: Box, profile: str, host: str, index: int) -> None:
    """A pretended host as a comms agent of ``box``, as long as the demo runs; what goes wrong is told."""
    from osqbox.agent.comms.core import RefusedByServer
    from osqbox.agent.store import MemoryStore
    from osqbox.agent.wire import client_context
    from osqbox.cli.output import tell

    ready = box.ready()
    if not ready.get("comms"):
        return
    chosen = {"comms_profile": profile, "comms_transport": None, "comms_speed": 5.0, "state": None}
    chosen |= {"profile": host, "seed": 0, "index": index}
    agent = _agent(chosen, ready["comms"], client_context(Path(ready["ca"])), MemoryStore(), lambda _kind, _facts: None)
    try:
        await agent.enroll(*new_identity(), ready["enroll_secret"])
        await agent.run()
    except RefusedByServer as error:
        tell(f"no {profile} comms agent: {error}")
