"""``osqbox certs``: look at the certificates of a box, hand one to a client, renew, revoke."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osqbox.clock import SystemClock, rfc3339
from osqbox.errors import BadUsage

from .find import Where, box_options
from .output import json_option, print_json, printable, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from osqbox.certs import CertificateFacts, Identity

LEAF_DAYS = 397
_PATH = click.Path(path_type=Path)


def _certs_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--certs",
        "directory",
        type=_PATH,
        default=_default_directory,
        metavar="DIR",
        help="Where the certificates are. Default: certs/ in a checkout, else the per-user data directory.",
    )(function)


def _default_directory() -> Path:
    from osqbox.settings import default_certs_dir

    return default_certs_dir()


@click.group("certs")
def command() -> None:
    """Certificates: the CA, the server's, the clients', or your own."""


@command.command()
@_certs_option
@click.option("--tls-cert", type=_PATH, help="Examine your own server certificate instead; needs --tls-key.")
@click.option("--tls-key", type=_PATH, help="Key of --tls-cert.")
@click.option("--client-ca", type=_PATH, help="Your own client CA, together with --tls-cert.")
@json_option
def show(directory: Path, tls_cert: Path | None, tls_key: Path | None, client_ca: Path | None, as_json: bool) -> None:
    """What is there, for whom, and until when."""
    from osqbox.certs import describe, revoked_serials, serial_text

    now = SystemClock().now()
    identity = _identity(directory, tls_cert, tls_key, client_ca, now)
    facts = describe(identity, now)
    if as_json:
        revoked = sorted(serial_text(serial) for serial in revoked_serials(identity))
        print_json(
            {
                "directory": str(identity.directory) if identity.directory else None,
                "certificates": [_facts_json(each) for each in facts],
                "revoked": revoked,
                "notes": identity.notes,
            }
        )
        return
    for each in facts:
        click.echo(_facts_text(each))
    for note in identity.notes:
        tell(printable(note))


def _identity(
    directory: Path, tls_cert: Path | None, tls_key: Path | None, client_ca: Path | None, now: float
) -> Identity:
    from osqbox.certs import Identity, existing_identity

    if tls_cert is None and tls_key is None and client_ca is None:
        return existing_identity(directory)
    if tls_cert is None or tls_key is None:
        raise BadUsage("expected --tls-cert and --tls-key together, got one of them or --client-ca alone")
    return Identity.from_own(tls_cert, tls_key, client_ca, now=now)


@command.command()
@click.argument("name")
@click.option("--tenant", default="default", show_default=True, help="The tenant the client belongs to.")
@click.option("--role", "roles", multiple=True, help="A role to write into the certificate; repeatable.")
@click.option(
    "--principal", "principals", multiple=True, help="A user it may run jobs as; repeatable, first is default."
)
@click.option("--days", type=float, help="How long it is valid. Default: 397.")
@click.option("--hours", type=float, help="The same in hours.")
@click.option("--out", type=_PATH, metavar="DIR", help="Write there, with a copy of the CA, not to DIR/clients.")
@_certs_option
@json_option
def client(
    name: str,
    tenant: str,
    roles: tuple[str, ...],
    principals: tuple[str, ...],
    days: float | None,
    hours: float | None,
    out: Path | None,
    directory: Path,
    as_json: bool,
) -> None:
    """Issue a client certificate to NAME; prints where it, its key and the CA to trust are.

    Without a role it may run jobs and own them; roles are runner, viewer, operator and admin. Without a principal
    its jobs run as the server's own user.
    """
    from osqbox.certs import issue_client

    cert, key, ca = issue_client(
        directory,
        name,
        tenant=tenant,
        roles=roles,
        principals=principals,
        days=_days(days, hours, otherwise=LEAF_DAYS),
        out=out,
        now=SystemClock().now(),
    )
    paths = {"cert": str(cert), "key": str(key), "ca": str(ca)}
    if as_json:
        print_json(paths)
        return
    for word, path in paths.items():
        click.echo(f"{word:4} {path}")


def _days(days: float | None, hours: float | None, *, otherwise: float) -> float:
    if days is not None and hours is not None:
        raise BadUsage("expected --days or --hours, got both")
    return otherwise if days is hours is None else days if days is not None else (hours or 0) / 24


@command.command()
@click.argument("name")
@click.option("--tenant", default="default", show_default=True, help="The tenant the client belongs to.")
@click.option("--role", "roles", multiple=True, help="A role of the certificate; repeatable.")
@click.option("--principal", "principals", multiple=True, help="A user it may run jobs as; repeatable.")
@click.option("--days", type=float, help="How long the certificate is valid. Default: 1.")
@click.option("--hours", type=float, help="The same in hours.")
@click.option("--ttl", "ttl_min", type=float, default=15, show_default=True, help="Minutes to use the token in.")
@json_option
@box_options
def token(
    name: str,
    tenant: str,
    roles: tuple[str, ...],
    principals: tuple[str, ...],
    days: float | None,
    hours: float | None,
    ttl_min: float,
    as_json: bool,
    box: Where,
) -> None:
    """Make a one-time token, with which NAME gets a certificate for a key that never leaves its machine.

    It is shown only now: the box keeps its digest. `cmdctl login` uses it up.
    """
    from osqbox.cli.jobs_login import login_token

    order = {
        "name": name,
        "tenant": tenant,
        "roles": roles,
        "principals": principals,
        "valid_s": _days(days, hours, otherwise=1) * 86_400,
        "ttl_s": ttl_min * 60,
    }
    found = box.find()
    made = found.client.post("certificates/tokens", order)
    made["token"] = login_token(found.ready, made["token"])
    if as_json:
        print_json(made)
    else:
        click.echo(made["token"])


@command.command()
@click.argument("which", nargs=-1, metavar="[server|client|all|NAME]...")
@_certs_option
@json_option
def renew(which: tuple[str, ...], directory: Path, as_json: bool) -> None:
    """New keys and certificates; the server's if nothing is named. A running box follows by itself."""
    from osqbox.certs import renew

    changed = [str(path) for path in renew(directory, which or ("server",), now=SystemClock().now())]
    if as_json:
        print_json({"renewed": changed})
        return
    for path in changed:
        click.echo(path)


@command.command()
@click.argument("what", metavar="NAME|SERIAL|FILE")
@_certs_option
@json_option
def revoke(what: str, directory: Path, as_json: bool) -> None:
    """Refuse a client from now on: all certificates of a name, one serial number, or the one in a file."""
    from osqbox.certs import revoke, serial_text

    serials = [serial_text(serial) for serial in revoke(directory, what, now=SystemClock().now())]
    crl = str(directory / "client-ca.crl")
    if as_json:
        print_json({"revoked": serials, "crl": crl})
        return
    for serial in serials:
        click.echo(f"revoked {serial} in {crl}")


def _facts_json(facts: CertificateFacts) -> dict[str, Any]:
    times = {"not_before": rfc3339(facts.not_before), "not_after": rfc3339(facts.not_after)}
    return asdict(facts) | times | {"file": str(facts.file)}


def _facts_text(facts: CertificateFacts) -> str:
    until = (rfc3339(facts.not_after) or "")[:10]
    left = f"{facts.days_left} days left" if facts.days_left >= 0 else "EXPIRED"
    lines = [
        f"{facts.file}{'  REVOKED' if facts.revoked else ''}",
        f"  {facts.subject}" + (f": {', '.join(facts.names)}" if facts.names else ""),
        f"  until {until} ({left}), {facts.key_type}, issued by {facts.issuer}",
        f"  serial {facts.serial}",
        f"  sha256 {facts.sha256}",
    ]
    return "\n".join(map(printable, lines))
