"""``osqbox agent``: this machine or a pretended one as a node, in the foreground, in 0..n instances."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osqbox.cli.agent_comms import TOLD, comms_options, refuse_without_comms, run_comms
from osqbox.cli.control import control_of, control_options
from osqbox.cli.find import Where, box_options
from osqbox.cli.output import F, json_option, print_json, print_json_line, print_table, printable, tell
from osqbox.errors import BadUsage, OsqboxError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import trio

    from osqbox.agent.instances.options import InstanceSpec, RunnerOptions
    from osqbox.agent.instances.task import Machine
    from osqbox.cli.find import Found

_TOLD = {
    "enrolled": "enrolled as {host_identifier}",
    "enroll_failed": "not enrolled (attempt {attempt}): {reason}",
    "node_invalid": "the server no longer knows this node; enrolling again",
    "config": "config applied: {queries} scheduled queries",
    "distributed": "answered {name}: {rows} rows, status {status}",
    "carved": "carve {carve_guid}: {status}",
    "call_failed": "{call}: {reason}",
    "connected": "connected, pid {pid}",
    "ended": "ended: {reason}",
    "removed": "removed",
    "shells_refused": "no remote shells: {reason}",
    "shell_started": "shell {session}: {shell} as {user}",
    "shell_ended": "shell {session} ended: {reason}",
    **TOLD,
}
_LAZY = {"capture": ("osqbox.cli.agent_capture", "Make a host profile from this machine.")}


class _Agent(click.Group):
    """Its larger verbs are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY:
            return super().get_command(ctx, cmd_name)
        import importlib

        found: click.Command = importlib.import_module(_LAZY[cmd_name][0]).command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        lines = {name: verb.get_short_help_str(100) for name, verb in self.commands.items()}
        lines |= {name: line for name, (_, line) in _LAZY.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(lines.items()))


def root_option(function: F) -> F:
    path = click.Path(path_type=Path, file_okay=False)
    return click.option("--root", type=path, metavar="DIR", help="Where its instances live.")(function)


@click.group(cls=_Agent, invoke_without_command=True)
@click.option("--tls-hostname", metavar="HOST:PORT", help="The server. Default: the box that runs here.")
@click.option("--ca", type=click.Path(path_type=Path), metavar="FILE", help="The CA its certificate is checked by.")
@click.option("--enroll-secret", metavar="SECRET", help="Chooses the tenant. Default: the box's own.")
@click.option(
    "--host-identifier",
    default="hostname",
    metavar="WORD",
    help="hostname, uuid, instance or ephemeral; any other word is the identifier itself.",
)
@click.option("--interval", type=click.IntRange(1), metavar="SECONDS", help="Between distributed reads. Default: 10.")
@click.option("--state", type=click.Path(path_type=Path), metavar="DIR", help="Keep key and results over restarts.")
@click.option(
    "--dialect",
    type=click.Choice(["osquery", "launcher"]),
    default="osquery",
    help="osquery's own API (default), or Kolide Launcher's JSON-RPC.",
)
@click.option("--client-cert", type=click.Path(path_type=Path), metavar="FILE", help="Its certificate (PEM).")
@click.option("--client-key", type=click.Path(path_type=Path), metavar="FILE", help="And the key to it.")
@click.option("--profile", metavar="NAME", help="Pretend a host of this profile, such as ubuntu.")
@click.option("--seed", type=int, default=0, help="Chooses what its hosts are like.")
@click.option("--index", type=click.IntRange(0), default=0, help="Which of its hosts.")
@click.option("--instances", metavar="NAME,...", help="Run one osquery instance per tenant named here; '' is none yet.")
@click.option("--secret", "secrets", multiple=True, metavar="NAME=SECRET", help="An instance's enroll secret.")
@click.option("--osqueryd", type=click.Path(path_type=Path), metavar="PATH", help="The real program, for --instances.")
@click.option("--in-process", is_flag=True, help="Instances as tasks of this process instead of processes.")
@click.option("--shared-client", is_flag=True, help="One HTTPS client for all instances instead of one each.")
@root_option
@comms_options
@control_options
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines.")
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, **options: Any) -> int:
    """Run an osquery agent that answers SQL with this machine's real data, until Ctrl-C.

    With --instances it runs one osquery instance per tenant, and is asked and changed by the verbs below. With --comms
    it is an agent of the comms API instead: it sends inventory and logs, and does what commands say.
    """
    if ctx.invoked_subcommand is not None:
        ctx.obj = options["root"]
        return 0
    if options["comms"] is not None:
        return run_comms(options, partial(_teller(as_json), ""), _until_signal)
    refuse_without_comms(options)
    if options["instances"] is None:
        _refuse_without_instances(options)
        return _run_one(as_json, options)
    return _run_instances(as_json, options)


def _refuse_without_instances(options: Mapping[str, Any]) -> None:
    for name in ("secrets", "osqueryd", "in_process", "shared_client", "root"):
        if options[name]:
            flag = "secret" if name == "secrets" else name.replace("_", "-")
            raise BadUsage(f"--{flag} goes with --instances", hint="osqbox agent --instances default")


# -- one agent ---------------------------------------------------------------------------------------------------


def _run_one(as_json: bool, options: Mapping[str, Any]) -> int:
    from osqbox.agent.messages import LINUX
    from osqbox.agent.runner import AgentOptions, run_agent
    from osqbox.agent.sql import Engine

    control = control_of(options)
    server, found = _server(options)
    secret = options["enroll_secret"] or (found.ready.get("enroll_secret") if found else None)
    machine = _pretended(options)
    agent = AgentOptions(
        **server,
        **_identifier(options["host_identifier"]),
        enroll_secret=secret or "",
        distributed_interval=options["interval"] or 10,
        state_dir=options["state"],
        hostname=machine.hostname if machine else None,
        uuid=machine.uuid if machine else None,
        platform_type=machine.platform_type if machine else LINUX,
        control=control,
        launcher=options["dialect"] == "launcher",
    )
    told = partial(_teller(as_json), "")
    tables, engine = (machine.tables, Engine(schema=machine.schema)) if machine else (None, None)
    return _until_signal(partial(run_agent, agent, tables=tables, engine=engine, on_event=told))


def _server(options: Mapping[str, Any]) -> tuple[dict[str, Any], Found | None]:
    """Where the server is and how it is trusted; the box itself when that is where the address came from."""
    hostname, ca, found = options["tls_hostname"], options["ca"], None
    if hostname is None:
        from osqbox.cli.find import find_box

        found = find_box()
        hostname, ca = str(found.ready["agents"]).removeprefix("https://"), ca or Path(found.ready["ca"])
    server = {"tls_hostname": hostname, "server_certs": ca}
    return {**server, "client_cert": options["client_cert"], "client_key": options["client_key"]}, found


def _identifier(word: str) -> dict[str, Any]:
    if word in ("hostname", "uuid", "instance", "ephemeral"):
        return {"host_identifier": word}
    return {"host_identifier": "specified", "specified_identifier": word}


def _pretended(options: Mapping[str, Any]) -> Machine | None:
    if not options["profile"]:
        return None
    import time

    from osqbox.agent.instances.task import Machine
    from osqbox.agent.profile import load_profile

    profile = load_profile(options["profile"])
    host = profile.host(seed=options["seed"], index=options["index"])
    who = host.identity
    return Machine(who.hostname, who.uuid, host.tables(time.time), profile.schema, who.platform_type)


# -- instances ---------------------------------------------------------------------------------------------------


def _run_instances(as_json: bool, options: Mapping[str, Any]) -> int:
    from osqbox.agent.instances.options import RunnerOptions

    if control_of(options) is not None:
        raise BadUsage("--control goes without --instances", hint="osqbox agent --control")
    if options["dialect"] != "osquery":
        raise BadUsage("--dialect launcher goes without --instances", hint="osqbox agent --dialect launcher")
    if options["state"]:
        raise BadUsage("--state goes without --instances", hint="osqbox agent --instances NAME,... --root DIR")
    program: Sequence[str] = ()
    flags = {}
    if options["osqueryd"]:
        if options["profile"] or options["in_process"]:
            raise BadUsage("--osqueryd goes without --profile and --in-process: it is the real program")
        program = (str(options["osqueryd"]),)
    elif options["profile"] and not options["in_process"]:
        chosen = {name: options[name] for name in ("profile", "seed", "index")}
        flags = {f"osqbox_{name}": str(value) for name, value in chosen.items()}
    server, found = _server(options)
    wanted = _specs(options, found)
    runner = RunnerOptions(
        **server,
        **_identifier(options["host_identifier"]),
        root=options["root"] or default_root(),
        program=program,
        in_process=options["in_process"],
        shared_client=options["shared_client"],
        distributed_interval=options["interval"] or 1,
        flags=flags,
    )
    machine = _pretended(options) if options["in_process"] else None
    return _until_signal(partial(_live, runner, wanted, machine, _teller(as_json)))


async def _live(
    options: RunnerOptions,
    wanted: Sequence[InstanceSpec],
    machine: Machine | None,
    told: Callable[[str, str, dict[str, Any]], None],
) -> None:
    import trio

    from osqbox.agent.instances.control import serve_control
    from osqbox.agent.instances.manager import open_runner

    async with open_runner(options, machine=machine, on_event=told) as runner, trio.open_nursery() as nursery:
        await nursery.start(serve_control, runner)
        told("", "ready", {"root": str(options.root), "instances": [spec.name for spec in wanted]})
        for spec in wanted:
            runner.add(spec)


def _specs(options: Mapping[str, Any], found: Found | None) -> list[InstanceSpec]:
    from osqbox.agent.instances.options import InstanceSpec

    names = [name.strip() for name in options["instances"].split(",") if name.strip()]
    given = _secrets(options["secrets"])
    for name in given.keys() - set(names):
        raise BadUsage(f"--secret {name}=...: expected one of --instances {','.join(names)}")
    if len(set(names)) != len(names):
        raise BadUsage(f"expected each instance once, got {','.join(names)}")
    common = options["enroll_secret"]
    return [InstanceSpec(name, given.get(name) or common or _secret_from(found, name)) for name in names]


def _secrets(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for name, equals, secret in pairs:
        if not (name and equals and secret):
            # What was given may be a secret, so it is not repeated.
            raise BadUsage("--secret: expected NAME=SECRET", hint="osqbox agent --instances kolide --secret kolide=...")
    return {name: secret for name, _, secret in pairs}


def _secret_from(found: Found | None, name: str) -> str:
    """A secret of that tenant of the box, which is made when it is not there yet."""
    from osqbox.client import at

    if found is None:
        raise BadUsage(
            f"expected the enroll secret of {name}: only a box that runs here can be asked for one",
            hint=f"osqbox agent --tls-hostname ... --instances {name} --secret {name}=SECRET",
        )
    tenants = {tenant["name"] for tenant in found.client.get("tenants")}
    path, body = (
        (at("tenants", name, "secrets"), {"label": "agent"}) if name in tenants else ("tenants", {"name": name})
    )
    return str(found.client.post(path, body)["enroll_secret"])


def default_root() -> Path:
    from osqbox.settings import user_dir

    return user_dir() / "agent"


# -- asking the running agent ------------------------------------------------------------------------------------


def _ask(root: Path | None, do: str, **request: Any) -> Any:
    from osqbox.agent.instances.control import ask

    # `agent --root DIR status` is `agent status --root DIR`.
    root = root or click.get_current_context().find_object(Path)
    return ask(root or default_root(), do, **request)


@command.command()
@json_option
@root_option
def status(root: Path | None, as_json: bool) -> None:
    """What the running agent's instances do, checked now, and how their last runs ended."""
    found = _ask(root, "status")
    if as_json:
        print_json(found)
        return
    _print_columns(
        found["instances"], "name status pid restarts enrolled enroll_error problem last_error", empty="no instances"
    )
    if found["history"]:
        click.echo()
        _print_columns(found["history"], "enrollment_id start_time connect_time exit_time errors", empty="")


def _print_columns(rows: Sequence[Mapping[str, Any]], columns: str, *, empty: str) -> None:
    names = columns.split(" ")
    headers = [name.upper().replace("_", " ") for name in names]
    print_table(headers, [[row.get(name) for name in names] for row in rows], empty=empty)


@command.command("add-instance")
@click.argument("name")
@click.option("--secret", metavar="SECRET", help="Its enroll secret. Default: one of that tenant of the box.")
@root_option
@box_options
def add_instance(name: str, secret: str | None, root: Path | None, box: Where) -> None:
    """Run one more instance; the others do not notice."""
    if secret is None:
        _ask(root, "status")  # before a tenant is made for nobody
        secret = _secret_from(box.find(), name)
    _ask(root, "add_instance", name=name, enroll_secret=secret)
    tell(f"{name}: added")


@command.command("remove-instance")
@click.argument("name")
@root_option
def remove_instance(name: str, root: Path | None) -> None:
    """Stop an instance and wait until it is gone; its database and node key stay for the next time."""
    _ask(root, "remove_instance", name=name)
    tell(f"{name}: removed")


@command.command()
@click.argument("sql")
@click.option("--instance", metavar="NAME", help="The one to ask. Default: default, or the only one.")
@json_option
@root_option
def query(sql: str, instance: str | None, root: Path | None, as_json: bool) -> None:
    """Ask one instance directly, without the server."""
    rows = _ask(root, "query", sql=sql, instance=instance or "")
    if as_json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), [list(row.values()) for row in rows], empty="")
    else:
        tell("no rows")


# -- running -----------------------------------------------------------------------------------------------------


def _teller(as_json: bool) -> Callable[[str, str, dict[str, Any]], None]:
    def told(name: str, kind: str, facts: dict[str, Any]) -> None:
        if as_json:
            print_json_line({"event": kind, **({"instance": name} if name else {}), **facts})
        elif kind in _TOLD:
            with suppress(KeyError):
                text = _TOLD[kind].format(**{fact: printable(value) for fact, value in facts.items()})
                tell(f"{name}: {text}" if name else text)

    return told


def _until_signal(run: Callable[[], Awaitable[None]]) -> int:
    """Run until it ends or Ctrl-C or SIGTERM comes. Raises what it raises, out of every group."""
    import trio

    failure: list[OsqboxError] = []

    async def main() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on, signals, nursery.cancel_scope)
                try:
                    await run()
                except* OsqboxError as group:
                    failure.append(_first(group))
                    nursery.cancel_scope.cancel()

    trio.run(main)
    if failure:
        raise failure[0]
    return 0


def _first(group: BaseExceptionGroup[OsqboxError]) -> OsqboxError:
    error: Any = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    found: OsqboxError = error
    return found


async def _cancel_on(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()
