"""``osqbox swarm``: thousands of agents in one process, against this box or any osquery server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from osqbox.cli.agent_comms import HERE, comms_url
from osqbox.cli.control import control_of, scripted_options
from osqbox.cli.find import Where, box_options
from osqbox.cli.output import print_facts, tell
from osqbox.errors import BadSetup, BadUsage, OsqboxError, VerdictFailed

if TYPE_CHECKING:
    import ssl

    from osqbox.agent.swarm.build import Hosts
    from osqbox.agent.swarm.comms import CommsPlan
    from osqbox.agent.swarm.plan import SwarmPlan
    from osqbox.agent.swarm.run import OnProgress, Progress

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, dir_okay=False)
_SHARE = click.FloatRange(0, 1)
_SECONDS = click.FloatRange(0, min_open=True)
_CALLS = ("enroll", "config", "log", "read", "write")


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


_where = _options(
    click.option("--server", metavar="URL", help="https://HOST:PORT[/PREFIX]. Default: the box that runs here."),
    click.option("--ca", type=_FILE, metavar="FILE", help="The CA the server's certificate is checked by."),
    click.option("--enroll-secret", metavar="SECRET", help="Default: the box's own."),
    click.option("--dialect", default="osqbox", metavar="NAME", help="Whose paths to use: osqbox (default), fleet, "
                 "kolide, osctrl, zentral, doorman, testserver, goquery, spasam, queryops, uptycs, launcher."),
    *(click.option(f"--{call}-endpoint", metavar="PATH", help=f"The path of {call} calls instead.") for call in _CALLS),
    click.option("--client-cert", type=_FILE, metavar="FILE", help="The certificate all agents present (PEM)."),
    click.option("--client-key", type=_FILE, metavar="FILE", help="And the key to it."),
    click.option("--comms", is_flag=False, flag_value=HERE, metavar="[URL]",
                 help="Agents of the comms API. Default: of the box that runs here."),
    click.option("--comms-kinds", metavar="MIX", help="Kinds by weight: sse (default), ws, poll, g1; sse:3,g1:1."),
    click.option("--comms-speed", type=_SECONDS, metavar="FACTOR", help="Their waits are so many times shorter."),
    click.option("--comms-logs", type=click.FloatRange(0), metavar="SECONDS",
                 help="Between log events of an agent; 0 is never. Default: 10."),
    click.option("--comms-inventory", type=click.FloatRange(0), metavar="SECONDS",
                 help="Between looks at its inventory; 0 is never. Default: 3600."),
    click.option("--with-osquery", is_flag=True, help="With --comms: osquery agents on the same hosts too."),
    click.option("--insecure", is_flag=True, help="Do not check the server's certificate; osqueryd cannot do that."),
    click.option("--allow-remote", is_flag=True, help="Let the server be another machine than this."),
)  # fmt: skip
_how_many = _options(
    click.option("--count", default=100, type=click.IntRange(1, 100_000), help="Agents. Default: 100."),
    click.option("--spawn-rate", default=50.0, type=_SECONDS, metavar="N", help="Agents per second. Default: 50."),
    click.option("--duration", type=_SECONDS, metavar="SECONDS", help="In all. Default: 60; of a sweep, as it takes."),
    click.option("--mode", default="steady", type=click.Choice(["steady", "ramp", "sweep"]),
                 help="steady: all, then hold; ramp: one by one to the end; sweep: step by step until too many."),
    click.option("--step", default=25, type=click.IntRange(1), metavar="N", help="Sweep: agents per step."),
    click.option("--step-seconds", default=10.0, type=_SECONDS, metavar="S", help="Sweep: length of a step."),
    click.option("--stop-if", multiple=True, metavar="RULE",
                 help="Sweep: what is too many, such as p95>500. Default: errors>0.02 and p95>1000."),
    click.option("--fail-if", multiple=True, metavar="RULE", help="Exit with 6 if it holds at the end: errors>0.01."),
)  # fmt: skip
_what = _options(
    click.option("--profiles", default="ubuntu", metavar="MIX", help="Kinds of hosts by weight: ubuntu:3,windows:1."),
    click.option("--host-path", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
                 help="Hosts of Launcher's old simulator (YAML) instead of profiles; needs --hosts."),
    click.option("--hosts", metavar="TYPE:COUNT,...", help="How many of its types; a number alone is --count."),
    click.option("--seed", default=0, metavar="N", help="The same hosts, rows and troubles for the same number."),
    click.option("--start-time", metavar="TIME", help="What the agents' clocks show at first: Unix or RFC 3339."),
    click.option("--interval", type=click.IntRange(1), metavar="SECONDS",
                 help="Between distributed reads. Default: 1 for the box here, which holds reads; else 10."),
    click.option("--config-refresh", default=60, type=click.IntRange(1), metavar="SECONDS", help="Default: 60."),
    click.option("--log-period", default=4, type=click.IntRange(1), metavar="SECONDS", help="Default: 4."),
    click.option("--connections", default="shared", type=click.Choice(["shared", "thread"]),
                 help="One per agent, on which calls take turns, or one per thread as osqueryd has them."),
    click.option("--flag", "flags", multiple=True, metavar="NAME=VALUE", help="A further osqueryd flag."),
)  # fmt: skip
_trouble = _options(
    click.option("--fail-queries", default=0.0, type=_SHARE, metavar="SHARE", help="Trouble: queries that fail."),
    click.option("--slow-writes", default=0.0, type=_SHARE, metavar="SHARE", help="Trouble: agents that send slowly."),
    click.option("--reenroll-every", default=0.0, type=click.FloatRange(0), metavar="SECONDS",
                 help="Trouble: all agents lose their key at once, again and again."),
    click.option("--clock-skew", default=0.0, type=click.FloatRange(0), metavar="SECONDS",
                 help="Trouble: clocks that are wrong by up to so much."),
    click.option("--duplicate-hardware", default=0.0, type=_SHARE, metavar="SHARE",
                 help="Trouble: agents with one and the same hardware uuid."),
)  # fmt: skip
_reports = _options(
    click.option("--json", "json_file", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE",
                 help="Write the report as JSON; - is standard output."),
    click.option("--html", "html_file", type=_FILE, metavar="FILE", help="Write it as one HTML page with charts."),
    click.option("--progress/--no-progress", default=None, help="Default: on a terminal."),
    click.option("--locustfile", is_flag=True, help="Print a locustfile for the same swarm on many machines, and end."),
)  # fmt: skip


@click.command()
@_where
@_how_many
@_what
@_trouble
@scripted_options
@_reports
@box_options
def command(box: Where, fail_if: tuple[str, ...], **given: Any) -> int:
    """Run many agents against a server, each with its own connection, state and SQL over its own pretended host.

    Ends after --duration, with Ctrl-C, or when a sweep has found the limit; then tells what it cost.
    """
    from osqbox.agent.swarm.plan import read_threshold

    thresholds = [read_threshold(text) for text in fail_if]
    if given["hosts"] is not None and given["hosts"].isdecimal():
        given["count"], given["hosts"] = _count(given["hosts"]), None
    comms = None
    if given["comms"] is not None:
        comms = _comms_plan(box, given)
    else:
        _refuse_without_comms(given)
    if comms is None or given["with_osquery"]:
        _find(box, given)
    plan = _plan(given) if comms is None or given["with_osquery"] else None
    if given["locustfile"]:
        if plan is None or comms is not None:
            raise BadUsage("--locustfile is for osquery agents, without --comms")
        from osqbox.agent.swarm.locustfile import locustfile

        click.echo(locustfile(plan, given["ca"], given["profiles"]), nl=False)
        return 0
    of_hosts = plan or (comms.swarm if comms else None)
    assert of_hosts is not None
    hosts = _hosts(of_hosts, given["host_path"])
    report = _run(plan, comms, hosts, _tls(given), _progress(given["progress"]))
    failed = _verdicts(report, thresholds)
    _write(report | {"failed": failed}, given["json_file"], given["html_file"])
    if failed:
        raise VerdictFailed("; ".join(failed))
    return 0


# -- what was asked for ------------------------------------------------------------------------------------------


def _find(box: Where, given: dict[str, Any]) -> None:
    """Fill in the box that runs here where no server is named."""
    if given["server"] is None:
        ready = box.find().ready
        given["server"] = ready["agents"]
        given["ca"] = given["ca"] or (Path(ready["ca"]) if ready.get("ca") else None)
        given["enroll_secret"] = given["enroll_secret"] or ready.get("enroll_secret")
        given["interval"] = given["interval"] or 1
    if not given["enroll_secret"]:
        raise BadUsage("an enroll secret is needed", hint="osqbox swarm --server URL --ca FILE --enroll-secret SECRET")


def _count(text: str) -> int:
    if not 1 <= int(text) <= 100_000:
        raise BadUsage(f"expected --hosts from 1 to 100000, got {text}")
    return int(text)


def _refuse_without_comms(given: dict[str, Any]) -> None:
    for name in ("comms_kinds", "comms_speed", "comms_logs", "comms_inventory", "with_osquery"):
        if given[name]:
            raise BadUsage(f"--{name.replace('_', '-')} goes with --comms", hint="osqbox swarm --comms --hosts 1000")


def _comms_plan(box: Where, given: dict[str, Any]) -> CommsPlan:
    """Raises BadUsage, and BadSetup when the box that runs here has no comms listener."""
    from osqbox.agent.comms.options import Load, Pace
    from osqbox.agent.swarm import plan as p
    from osqbox.agent.swarm.comms import CommsPlan, read_kinds

    if given["mode"] == "sweep":
        raise BadUsage("--mode sweep is for osquery agents, without --comms")
    if given["comms"] == HERE:
        ready = box.find().ready
        given["comms"] = comms_url(ready)
        given["ca"] = given["ca"] or (Path(ready["ca"]) if ready.get("ca") else None)
        given["enroll_secret"] = given["enroll_secret"] or ready.get("enroll_secret")
    if not given["enroll_secret"]:
        raise BadUsage("an enroll secret is needed", hint="osqbox swarm --comms URL --ca FILE --enroll-secret SECRET")
    mix = p.read_mix(given["hosts"] or given["profiles"])
    swarm = p.SwarmPlan(
        server=p.server(given["comms"], allow_remote=given["allow_remote"]),
        growth=p.Growth(
            len(mix.round) if given["hosts"] else given["count"],
            given["spawn_rate"],
            _duration_s(given),
            given["mode"],
        ),
        mix=mix,
        enroll_secret=given["enroll_secret"],
        seed=given["seed"],
        allow_remote=given["allow_remote"],
    )
    usual = CommsPlan(swarm).load
    load = Load(
        inventory_every_s=_or(given["comms_inventory"], usual.inventory_every_s),
        inventory_items=usual.inventory_items,
        logs_every_s=_or(given["comms_logs"], usual.logs_every_s),
        logs_items=usual.logs_items,
    )
    kinds = read_kinds(given["comms_kinds"] or "sse")
    return CommsPlan(swarm, kinds, Pace().times_faster(given["comms_speed"] or 1.0), load)


def _or(given: float | None, usual: float) -> float:
    return usual if given is None else given


def _plan(given: dict[str, Any]) -> SwarmPlan:
    from osqbox.agent.swarm import plan as p

    if (given["host_path"] is None) != (given["hosts"] is None):
        raise BadUsage("expected --host-path DIR and --hosts TYPE:COUNT,... together, got one of them")
    mix = p.read_mix(given["hosts"] or given["profiles"])

    server = p.server(given["server"], allow_remote=given["allow_remote"])
    stop_if = given["stop_if"] or ("errors>0.02", "p95>1000")
    return p.SwarmPlan(
        server=server,
        growth=p.Growth(
            len(mix.round) if given["hosts"] else given["count"],
            given["spawn_rate"],
            _duration_s(given),
            given["mode"],
            given["step"],
            given["step_seconds"],
        ),
        mix=mix,
        enroll_secret=given["enroll_secret"],
        endpoints=p.endpoints(given["dialect"], server.prefix, {call: given[f"{call}_endpoint"] for call in _CALLS}),
        launcher=given["dialect"] == "launcher",
        seed=given["seed"],
        start_time=_start_time(given["start_time"]),
        interval_s=given["interval"] or 10,
        config_refresh_s=given["config_refresh"],
        log_period_s=given["log_period"],
        connections=given["connections"],
        allow_remote=given["allow_remote"],
        trouble=p.Trouble(
            given["fail_queries"],
            given["slow_writes"],
            given["reenroll_every"],
            given["clock_skew"],
            given["duplicate_hardware"],
        ),
        stop_if=tuple(p.read_threshold(text) for text in stop_if),
        flags=dict(_flag(text) for text in given["flags"]),
        control=control_of(given),
    )


def _duration_s(given: dict[str, Any]) -> float:
    if given["duration"] is not None:
        return float(given["duration"])
    steps = -(-given["count"] // given["step"])
    return steps * (given["step_seconds"] + 60.0) if given["mode"] == "sweep" else 60.0


def _start_time(text: str | None) -> float | None:
    import datetime as dt

    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = dt.datetime.fromisoformat(text)
    except ValueError:
        raise BadUsage(f"expected --start-time as 1767225600 or 2026-01-01T00:00:00Z, got {text!r}") from None
    return (found if found.tzinfo else found.replace(tzinfo=dt.UTC)).timestamp()


def _flag(text: str) -> tuple[str, str]:
    name, sign, value = text.lstrip("-").partition("=")
    if not name or not sign:
        raise BadUsage(f"expected --flag NAME=VALUE, got {text!r}")
    return name, value


def _tls(given: dict[str, Any]) -> ssl.SSLContext:
    from osqbox.agent.wire import client_context

    context = client_context(given["ca"], given["client_cert"], given["client_key"])
    if given["insecure"]:
        import ssl

        tell("osqbox: --insecure: the server's certificate is not checked, the enroll secret goes to whoever answers")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# -- running -----------------------------------------------------------------------------------------------------


def _hosts(plan: SwarmPlan, directory: Path | None) -> Hosts:
    from osqbox.agent.swarm.build import ProfileHosts, SimulatedHosts

    if directory is None:
        return ProfileHosts(plan)
    from osqbox.agent.simulator import load_host_types

    return SimulatedHosts(plan, load_host_types(directory))


def _run(
    plan: SwarmPlan | None, comms: CommsPlan | None, hosts: Hosts, tls: ssl.SSLContext, on_progress: OnProgress | None
) -> dict[str, Any]:
    import trio

    from osqbox.cli.tune import tune_process

    tune_process()

    async def run() -> dict[str, Any]:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signal, stop)
            report = await _run_both(plan, comms, hosts, tls, on_progress, stop)
            nursery.cancel_scope.cancel()
        return report

    try:
        return trio.run(run)
    except BaseExceptionGroup as group:
        cause: BaseException | None = group.subgroup(OsqboxError)
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if cause is None:
            raise
        raise cause from None
    finally:
        if on_progress and sys.stderr.isatty():
            tell("")  # off the line that is written over


async def _run_both(
    plan: SwarmPlan | None,
    comms: CommsPlan | None,
    hosts: Hosts,
    tls: ssl.SSLContext,
    on_progress: OnProgress | None,
    stop: Any,
) -> dict[str, Any]:
    """One report; with both kinds of agents that of the comms agents is its member ``comms``."""
    import trio

    reports: dict[str, dict[str, Any]] = {}

    async def run_osquery(plan: SwarmPlan) -> None:
        from osqbox.agent.swarm.run import run_swarm

        reports["osquery"] = await run_swarm(plan, hosts, tls, on_progress=on_progress, stop=stop)

    async def run_comms(plan: CommsPlan, show: OnProgress | None) -> None:
        from osqbox.agent.swarm.comms import run_comms_swarm

        reports["comms"] = await run_comms_swarm(plan, hosts, tls, on_progress=show, stop=stop)

    async with trio.open_nursery() as nursery:
        if plan is not None:
            nursery.start_soon(run_osquery, plan)
        if comms is not None:
            nursery.start_soon(run_comms, comms, on_progress if plan is None else None)
    if "osquery" not in reports:
        return reports["comms"]
    if "comms" not in reports:
        return reports["osquery"]
    theirs = reports["comms"]
    return {**reports["osquery"], "comms": {**theirs.pop("comms"), "swarm": theirs}}


async def _stop_on_signal(stop: Any, *, task_status: Any) -> None:
    import signal

    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            stop.set()


def _progress(wanted: bool | None) -> OnProgress | None:
    """One line that is written over; as lines of their own where there is no terminal but somebody asked."""
    is_terminal = sys.stderr.isatty()
    if wanted is False or (wanted is None and not is_terminal):
        return None

    def show(now: Progress) -> None:
        line = (
            f"{now.elapsed_s:6.0f} s  {now.enrolled}/{now.agents} of {now.wanted} agents enrolled  "
            f"{now.requests_per_s:7.0f} requests/s  {now.errors_per_s:5.0f} errors/s  "
            f"{now.errors} errors  {now.answers} answers"
        )
        click.echo(f"\r{line}\x1b[K" if is_terminal else line, err=True, nl=not is_terminal)

    return show


# -- telling -----------------------------------------------------------------------------------------------------


def _verdicts(report: dict[str, Any], thresholds: list[Any]) -> list[str]:
    from osqbox.agent.swarm.plan import met
    from osqbox.agent.swarm.tally import metrics_of

    failed = met(thresholds, metrics_of(report))
    if not report["enrolled"] and not report["enrollments"]:
        most = next(iter(report["errors_by_kind"]), "nothing was answered")
        failed.insert(0, f"no agent enrolled: {most}")
    return failed


def _write(report: dict[str, Any], json_file: Path | None, html_file: Path | None) -> None:
    from osqbox.agent.swarm.page import page

    if str(json_file) == "-":
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    try:
        if json_file is not None and str(json_file) != "-":
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if html_file is not None:
            html_file.write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise BadSetup(f"cannot write the report: {error}", hint="osqbox swarm ... --json -") from error


def _comms_facts(comms: dict[str, Any] | None) -> list[tuple[str, str]]:
    if comms is None:
        return []
    events = f"{comms['stateless_acknowledged']} stateless and {comms['stateful_acknowledged']} stateful"
    commands = "{commands_received} received, {commands_duplicate} twice, {commands_out_of_order}".format(**comms)
    return [
        ("comms", f"{comms['enrollments']} registered, {comms['logins']} logins, {comms['renewals']} of them renewals"),
        ("events", f"{events} acknowledged, {comms['events_refused']} refused, {comms['events_dropped']} dropped"),
        ("commands", f"{commands} out of order; {comms['results_sent']} results"),
        ("streams", f"{comms['streams_open']} open, {comms['reconnects']} reconnects"),
        *((f"  {count} x", kind) for kind, count in list(comms["errors"].items())[:10]),
    ]  # fmt: skip


def _print(report: dict[str, Any]) -> None:
    latency = (
        (f"{call} p50 p95 p99", " ".join(f"{values[p]:.1f}" for p in ("p50", "p95", "p99")) + " ms")
        for call, values in report["latency_ms"].items()
    )
    limit = report.get("limit")
    print_facts(
        [
            ("agents", f"{report['agents']}, {report['enrolled']} enrolled"),
            ("requests", f"{report['requests']}, {report['requests_per_s']:.1f}/s in {report['duration_s']:.1f} s"),
            ("errors", report["errors"]),
            *((f"  {count} x", kind) for kind, count in list(report["errors_by_kind"].items())[:10]),
            *latency,
            ("answers", f"{report['answers']} live queries, {report['log_lines']} log lines"),
            *_comms_facts(report.get("comms")),
            ("memory", f"{report['rss_bytes_per_agent'] / 1000:.1f} kB per agent, {report['rss_bytes'] / 1e6:.0f} MB"),
            ("processor", f"{report['cpu_s']:.1f} s"),
            *(
                [("limit", f"{limit['agents']} agents; {'; '.join(limit['stopped_by']) or 'not reached'}")]
                if limit
                else []
            ),
        ]
    )
