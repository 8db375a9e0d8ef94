"""``osqbox serve``: run the box until it is told to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from osqbox.cli.forward_options import forward_options, forward_sinks
from osqbox.errors import BadSetup
from osqbox.settings import Settings, default_certs_dir, default_data_dir

if TYPE_CHECKING:
    from osqbox.cli.program import Body
    from osqbox.settings import CommsSettings, ShellSettings

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


def serve_options(command: F) -> F:
    """The flags that `serve`, `demo` and `exec` share."""
    options = [
        click.option("--data", type=PATH, help="Directory of osqbox.db and what goes with it."),
        click.option("--certs", type=PATH, help="Directory of the CA, certificates and keys."),
        click.option("--ephemeral/--keep", "ephemeral", default=None, help="Throw the data away at the end."),
        click.option("--host", default="localhost", show_default=True, help="Where agents connect to."),
        click.option("--operator-host", default="127.0.0.1", show_default=True, help="A loopback address."),
        click.option("--agents-port", type=click.IntRange(0, 65535), help="Default 8443; 0 takes any free port."),
        click.option("--operator-port", type=click.IntRange(0, 65535), help="Default 8080; 0 takes any free port."),
        click.option("--comms-port", type=click.IntRange(0, 65535), help="Default 27000; any free port where 0, "
                     "or where agents' and operator's ports are 0."),
        click.option("--comms/--no-comms", "comms", default=True, help="The comms API for agents that send events "
                     "and receive commands."),
        click.option("--comms-socket", type=PATH, help="Where publishers of commands connect; default comms.sock "
                     "beside the data."),
        click.option("--comms-hold", type=click.FloatRange(0, 570), default=60.0, show_default=True, metavar="SECONDS",
                     help="How long an empty poll for commands is held when it does not say."),
        click.option("--comms-keys", type=PATH, help="Directory of the keys that sign agents' tokens, which boxes may "
                     "share; default beside the certificates."),
        click.option("--token-lifetime", type=click.IntRange(10, 86400), default=900, show_default=True,
                     metavar="SECONDS", help="Of an agent's token."),
        click.option("--token-algorithm", type=click.Choice(["RS256", "ES256"]), default="RS256", show_default=True),
        click.option("--engine-socket", type=PATH, help="Send stateless events to the engine at this unix socket."),
        click.option("--indexer-url", metavar="URL", help="Share agents, commands and states with other boxes in this "
                     "OpenSearch."),
        click.option("--indexer-ca", type=PATH, help="Its CA, when it is not publicly known."),
        click.option("--indexer-auth-file", type=PATH, help="File with its user:password."),
        click.option("--jobs-port", type=click.IntRange(0, 65535), help="Default 9090; any free port where 0, "
                     "or where both other ports are 0."),
        click.option("--jobs/--no-jobs", "jobs", default=True, help="The job runner (gRPC with client certificates)."),
        click.option("--jobs-user", metavar="USER", help="Run jobs as this unix user (needs root)."),
        click.option("--control", is_flag=True, help="The shell broker: operators may open shells on willing agents."),
        click.option("--shell-idle", type=click.FloatRange(1), default=900.0, metavar="SECONDS", show_default=True,
                     help="End a shell that is silent so long."),
        click.option("--shell-max", type=click.FloatRange(1), default=28800.0, metavar="SECONDS", show_default=True,
                     help="End a shell after so long."),
        click.option("--record/--no-record", default=True, help="Record shells. Default: yes."),
        click.option("--ready-file", type=PATH, help="Write the ready object here, once ready."),
        click.option("--enroll-secret", help="The default tenant's secret (visible to other users of this machine)."),
        click.option("--enroll-secret-file", type=PATH, help="The same from a file."),
        click.option("--config", "configs", type=PATH, multiple=True, help="osquery config, JSON or YAML; repeatable."),
        click.option("--approve", is_flag=True, help="New nodes wait for `osqbox nodes approve`."),
        click.option("--open-enrollment", is_flag=True, help="Enroll without a secret."),
        click.option("--cert-enrollment", is_flag=True, help="Enroll by client certificate alone."),
        click.option("--client-auth", type=click.Choice(["off", "optional", "required"]), default="optional"),
        click.option("--agents-tls-min", type=click.Choice(["1.0", "1.1", "1.2", "1.3"]), default="1.2"),
        click.option("--rsa", is_flag=True, help="RSA keys instead of P-256 on the first run."),
        click.option("--tls-cert", type=PATH, help="Your own server certificate (PEM chain)."),
        click.option("--tls-key", type=PATH, help="Its key."),
        click.option("--client-ca", type=PATH, help="Your own CA for client certificates."),
        click.option("--read-hold", type=click.FloatRange(0, 12), default=12.0, show_default=True, metavar="SECONDS",
                     help="How long an empty distributed read is held; 0 answers at once."),
        click.option("--keep-log-lines", type=click.IntRange(1), default=1_000_000, show_default=True),
        click.option("--keep-log-mib", type=click.IntRange(1), default=4096, show_default=True),
        click.option("--max-body-mib", type=click.IntRange(1, 1024), default=64, show_default=True),
        click.option("--json", "as_json", is_flag=True, help="Print the ready object as one JSON line."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing when ready."),
    ]  # fmt: skip
    command = forward_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def settings_from(options: dict[str, Any], data: Path, *, ephemeral: bool) -> Settings:
    """Settings from the shared flags. Raises BadSetup."""
    from osqbox.settings import MIB, Bounds, JobSettings, Retention

    all_free = options["agents_port"] == options["operator_port"] == 0

    def port(name: str, otherwise: int) -> int:
        given: int | None = options[name]
        return (0 if all_free else otherwise) if given is None else given

    return Settings(
        data_dir=data,
        certs_dir=(options["certs"] or default_certs_dir()).absolute(),
        host=options["host"],
        operator_host=options["operator_host"],
        agents_port=port("agents_port", 8443),
        operator_port=port("operator_port", 8080),
        read_hold_s=options["read_hold"],
        client_auth=options["client_auth"],
        agents_tls_min=options["agents_tls_min"],
        key_type="rsa" if options["rsa"] else "ec",
        tls_cert=options["tls_cert"],
        tls_key=options["tls_key"],
        client_ca=options["client_ca"],
        config_files=tuple(path.absolute() for path in options["configs"]),
        enroll_secret=_secret(options),
        jobs=JobSettings(options["host"], port("jobs_port", 9090), options["jobs_user"]) if options["jobs"] else None,
        comms=_comms(options, port("comms_port", 27000)),
        shells=_shells(options),
        forward=forward_sinks(options),
        approve=options["approve"],
        open_tenant=options["open_enrollment"],
        cert_enrollment=options["cert_enrollment"],
        ephemeral=ephemeral,
        retention=Retention(log_lines=options["keep_log_lines"], log_bytes=options["keep_log_mib"] * MIB),
        bounds=Bounds(body_bytes=options["max_body_mib"] * MIB, decoded_bytes=2 * options["max_body_mib"] * MIB),
    )


def _comms(options: dict[str, Any], port: int) -> CommsSettings | None:
    from osqbox.settings import CommsSettings

    if not options["comms"]:
        return None
    paths = {
        name: options[name] and options[name].absolute()
        for name in ("comms_socket", "comms_keys", "engine_socket", "indexer_ca", "indexer_auth_file")
    }
    return CommsSettings(
        port=port,
        socket=paths["comms_socket"],
        hold_s=options["comms_hold"],
        token_lifetime_s=options["token_lifetime"],
        token_algorithm=options["token_algorithm"],
        keys_dir=paths["comms_keys"],
        engine_socket=paths["engine_socket"],
        indexer_url=options["indexer_url"],
        indexer_ca=paths["indexer_ca"],
        indexer_auth_file=paths["indexer_auth_file"],
    )


def _shells(options: dict[str, Any]) -> ShellSettings | None:
    from osqbox.settings import ShellSettings

    if not options["control"]:
        return None
    return ShellSettings(options["shell_idle"], options["shell_max"], options["record"])


def _secret(options: dict[str, Any]) -> str | None:
    file: Path | None = options["enroll_secret_file"]
    if file is None:
        secret: str | None = options["enroll_secret"]
        return secret
    try:
        return file.read_text().strip()
    except OSError as error:
        raise BadSetup(f"cannot read the enroll secret from {file}: {error.strerror}") from None


def run_box(options: dict[str, Any], *, ephemeral: bool, body: Body | None = None) -> int:
    """Run a box in this process until it stops, with ``body`` beside it; returns the exit code."""
    from osqbox import running

    started_at = time.time()
    with ExitStack() as stack:
        if options["data"] is not None:
            data = options["data"].absolute()
        else:
            data = stack.enter_context(running.ephemeral_data_dir()) if ephemeral else default_data_dir()
        stack.enter_context(running.locked_data_dir(data))
        registration = running.Registration(data, started_at)
        stack.callback(registration.close)
        if options["ready_file"] is not None:
            options["ready_file"].unlink(missing_ok=True)
            stack.callback(options["ready_file"].unlink, missing_ok=True)
        from osqbox.cli.program import run_program

        return run_program(settings_from(options, data, ephemeral=ephemeral), options, registration, body)


@click.command()
@serve_options
def command(**options: Any) -> int:
    """Run the box: the server that osquery agents talk to.

    \b
    Examples:
      osqbox serve
      osqbox serve --config pack.yaml --data ./data
      osqbox serve --agents-port 0 --operator-port 0 --ready-file ready.json
    """
    return run_box(options, ephemeral=bool(options["ephemeral"]))
