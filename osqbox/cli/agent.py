"""``osqbox agent``: this machine as a node, in the foreground."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli.output import print_json_line, printable, tell
from osqbox.errors import OsqboxError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import trio

_TOLD = {
    "enrolled": "enrolled as {host_identifier}",
    "enroll_failed": "not enrolled (attempt {attempt}): {reason}",
    "node_invalid": "the server no longer knows this node; enrolling again",
    "config": "config applied: {queries} scheduled queries",
    "distributed": "answered {name}: {rows} rows, status {status}",
    "carved": "carve {carve_guid}: {status}",
    "call_failed": "{call}: {reason}",
}


@click.command()
@click.option("--tls-hostname", metavar="HOST:PORT", help="The server. Default: the box that runs here.")
@click.option("--ca", type=click.Path(path_type=Path), metavar="FILE", help="The CA its certificate is checked by.")
@click.option("--enroll-secret", metavar="SECRET", help="Chooses the tenant. Default: the box's own.")
@click.option(
    "--host-identifier",
    default="hostname",
    metavar="WORD",
    help="hostname, uuid, instance or ephemeral; any other word is the identifier itself.",
)
@click.option("--interval", default=10, metavar="SECONDS", help="Between distributed reads. Default: 10.")
@click.option("--state", type=click.Path(path_type=Path), metavar="DIR", help="Keep key and results over restarts.")
@click.option("--client-cert", type=click.Path(path_type=Path), metavar="FILE", help="Its certificate (PEM).")
@click.option("--client-key", type=click.Path(path_type=Path), metavar="FILE", help="And the key to it.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines.")
def command(tls_hostname: str | None, ca: Path | None, enroll_secret: str | None, as_json: bool, **options: Any) -> int:
    """Run an osquery agent that answers SQL with this machine's real data, until Ctrl-C."""
    import trio

    from osqbox.agent.runner import AgentOptions, run_agent

    if tls_hostname is None:
        from osqbox.cli.find import find_box

        ready = find_box().ready
        tls_hostname = str(ready["agents"]).removeprefix("https://")
        ca = ca or Path(ready["ca"])
        enroll_secret = enroll_secret or ready.get("enroll_secret")
    identifier = options["host_identifier"]
    named = identifier not in ("hostname", "uuid", "instance", "ephemeral")
    agent = AgentOptions(
        tls_hostname=tls_hostname,
        server_certs=ca,
        enroll_secret=enroll_secret or "",
        client_cert=options["client_cert"],
        client_key=options["client_key"],
        host_identifier="specified" if named else identifier,
        specified_identifier=identifier if named else "",
        distributed_interval=options["interval"],
        state_dir=options["state"],
    )

    def on_event(kind: str, facts: dict[str, Any]) -> None:
        if as_json:
            print_json_line({"event": kind, **facts})
        elif kind in _TOLD:
            tell(_TOLD[kind].format(**{name: printable(value) for name, value in facts.items()}))

    failure: list[OsqboxError] = []

    async def run() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on, signals, nursery.cancel_scope)
                try:
                    await run_agent(agent, on_event=on_event)
                except OsqboxError as error:  # kept out of the nursery's exception group
                    failure.append(error)
                    nursery.cancel_scope.cancel()

    trio.run(run)
    if failure:
        raise failure[0]
    return 0


async def _cancel_on(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()
