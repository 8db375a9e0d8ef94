"""Where the job verbs call: a server that is named, or the box that runs here; and with which certificate."""

from __future__ import annotations

import binascii
import calendar
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osqbox.cli.find import NoBox, Where
from osqbox.cli.output import printable, span, tell
from osqbox.errors import BadSetup, NotInTime
from osqbox.identity import read_file, shell

if TYPE_CHECKING:
    from osqbox.jobs.client import JobClient
    from osqbox.jobs.errors import JobError
    from osqbox.jobs.grpc_h2 import Channel

DAY_S = 86_400
WARN_DAYS = 14
"""A certificate with less validity left is talked about."""
GENERALIZED_TIME = 0x18
CONFIG_FILE = "cmdctl.toml"
CONFIG_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """None is not told."""

    server: str | None = None
    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def over(self, other: Target) -> Target:
        """This one, filled up from another."""
        return Target(*(getattr(self, each.name) or getattr(other, each.name) for each in fields(Target)))

    def missing(self) -> list[str]:
        return [each.name for each in fields(Target) if getattr(self, each.name) is None]


@dataclass
class Dialer:
    """Opens channels to wherever the target is at that time. Raises UserError, and JobError from the channel."""

    find: Callable[[], Target]
    called: str
    """The program, in warnings."""
    _has_found: bool = field(default=False, init=False)

    def __call__(self) -> Channel:
        from osqbox.jobs.grpc_h2 import Address, Channel, client_context

        target = self._found()
        assert target.server is not None
        assert target.ca is not None
        assert target.cert is not None
        assert target.key is not None
        check_key(target.key)
        if not self._has_found:
            self._has_found = True
            warn_of_expiry(target.cert, time.time(), self.called)
        return Channel(Address.parse(target.server), client_context(target.ca, target.cert, target.key))

    def _found(self) -> Target:
        """A box that was there and is not now may come back."""
        from osqbox.jobs.errors import Code, JobError
        from osqbox.jobs.grpc_h2 import UNREACHABLE

        try:
            return self.find()
        except (NoBox, NotInTime) as error:
            if not self._has_found:
                raise
            raise JobError(Code.UNAVAILABLE, str(error), reason=UNREACHABLE) from None


def connect(dialer: Dialer, reconnect_s: float) -> JobClient:
    from osqbox.jobs.client import JobClient

    told = False

    def tell_once(error: JobError) -> None:
        nonlocal told
        if not told:
            told = True
            tell(printable(f"{dialer.called}: {error.message}; trying again for up to {reconnect_s:g} s"))

    return JobClient(dialer, reconnect_s=reconnect_s, on_break=tell_once)


# ---- the box that runs here ------------------------------------------------------------------------------


def box_target(where: Where) -> Target:
    """The jobs listener of a box, with the certificate of its first client if it made one. Raises UserError."""
    ready = where.find().ready
    if not ready.get("jobs"):
        raise BadSetup("this box does not run jobs", hint="osqbox serve --jobs-port 9090")
    names = {"server": "jobs", "cert": "client_cert", "key": "client_key", "ca": "ca"}
    return _target({ours: ready.get(theirs) for ours, theirs in names.items()})


# ---- cmdctl's own settings -------------------------------------------------------------------------------


def named_target(given: Mapping[str, Any], config: Path | None) -> Target:
    """From options, then ``CMDCTL_*``, then the file; where no server is named, the box that runs here.

    Raises UserError, BadSetup when something to reach it with is not named.
    """
    target = _target(given).over(_target(_environment())).over(_target(read_config(config)))
    return whole(target if target.server else target.over(box_target(Where(None, None, None))))


def whole(target: Target) -> Target:
    """Raises BadSetup for a target that lacks something."""
    if missing := target.missing():
        raise BadSetup(
            f"the server is {target.server}, but nothing names the {' and the '.join(missing)}",
            hint=f"cmdctl login TOKEN, or cmdctl {' '.join(f'--{name} FILE' for name in missing)} ...",
        )
    return target


def _target(values: Mapping[str, Any]) -> Target:
    server = values.get("server") or None
    return Target(server, *(Path(values[name]) if values.get(name) else None for name in ("cert", "key", "ca")))


def _environment() -> dict[str, str]:
    return {each.name: os.environ.get(f"CMDCTL_{each.name.upper()}", "") for each in fields(Target)}


def config_dir() -> Path:
    """Where ``cmdctl login`` writes, and ``cmdctl.toml`` is looked for."""
    base = os.environ.get("XDG_CONFIG_HOME") or ""
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "cmdctl"


def read_config(named: Path | None) -> dict[str, Any]:
    """The settings of the named file, or of the first in its usual places; paths made absolute.

    The working directory is not one of those places: whoever can write there would choose the server.
    """
    if named is None and (from_environment := os.environ.get("CMDCTL_CONFIG")):
        named = Path(from_environment)
    usual = (config_dir() / CONFIG_FILE, config_dir().parent / CONFIG_FILE)
    file = named or next((path for path in usual if path.is_file()), None)
    return {} if file is None else parse_config(file, read_file(file))


def parse_config(file: Path, content: bytes) -> dict[str, Any]:
    """Raises BadSetup for anything that is not understood: a word misspelt must not be a setting ignored."""
    import tomllib

    known = [each.name for each in fields(Target)]
    try:
        if len(content) > CONFIG_BYTES:
            raise ValueError(f"expected at most {CONFIG_BYTES} bytes")
        settings = tomllib.loads(content.decode())
    except ValueError as error:
        raise BadSetup(f"{file}: expected TOML: {error}") from None
    for name, value in settings.items():
        if name not in known:
            raise BadSetup(f"{file}: expected {', '.join(known)}, got {name!r}")
        if not isinstance(value, str) or not value:
            raise BadSetup(f"{file}: {name}: expected a text, got {value!r}")
    paths = {name: file.parent / Path(value).expanduser() for name, value in settings.items() if name != "server"}
    return {**settings, **paths}


# ---- the certificate -------------------------------------------------------------------------------------


def check_key(key: Path) -> None:
    """Raises BadSetup for a key that is not there, or that others than its owner can read."""
    try:
        mode = key.stat().st_mode
    except OSError as error:
        raise BadSetup(f"the key {key} cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise BadSetup(
            f"the key {key} can be read by others than its owner (mode {mode & 0o777:04o}); expected 0600",
            hint=shell("chmod", "600", key),
        )


def warn_of_expiry(cert: Path, now: float, called: str) -> None:
    """Of one that was made for less than a month, in the second half of its time."""
    dates = validity(read_file(cert))
    if dates is None:
        return
    left_s = dates[1] - now
    if left_s < min(WARN_DAYS * DAY_S, (dates[1] - dates[0]) / 2):
        when = "has expired" if left_s <= 0 else f"expires in {span(left_s)}"
        tell(f"{called}: the certificate {cert} {when}; get another with: cmdctl login TOKEN, or osqbox certs renew")


def validity(pem: bytes) -> tuple[float, float] | None:
    """Start and end of a certificate's validity; None if they cannot be read, which TLS will complain about.

    Read from the DER by hand (RFC 5280, 4.1): loading ``cryptography`` would double the time a verb takes to start.
    """
    try:
        text = pem.decode("ascii", "ignore")
        first = text[text.index(ssl.PEM_HEADER) :].partition(ssl.PEM_FOOTER)[0] + ssl.PEM_FOOTER
        _, certificate, _ = _element(ssl.PEM_cert_to_DER_cert(first))
        _, rest, _ = _element(certificate)
        for _ in range(4 if rest[0] == 0xA0 else 3):  # version, serial, algorithm, issuer
            _, _, rest = _element(rest)
        _, dates, _ = _element(rest)
        start, before, rest = _element(dates)
        end, after, _ = _element(rest)
        return _moment(start, before), _moment(end, after)
    except (ValueError, IndexError, binascii.Error):
        return None


def _moment(tag: int, text: bytes) -> float:
    """UTCTime has two digits for the year, of 1950 to 2049."""
    century = "" if tag == GENERALIZED_TIME else "20" if text < b"50" else "19"
    return calendar.timegm(time.strptime(century + text.decode(), "%Y%m%d%H%M%SZ"))


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """Tag and content of the first element, and what comes after it."""
    size, start = der[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[2:start], "big")
    return der[0], der[start : start + size], der[start + size :]
