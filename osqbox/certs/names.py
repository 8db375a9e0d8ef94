"""Names in certificates: hosts and addresses of a server, the identity and roles of a client, serial numbers."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from osqbox.errors import BadUsage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FQDN_WAIT_S = 0.2
"""A resolver that answers later does not get a say in the server certificate."""
FIRST_CLIENT = "client"
WORDS = frozenset({"server", FIRST_CLIENT, "all", "ca", "client-ca"})
"""Names that already mean something to the verbs, so no client may have them."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,62}(?<!\.)")
_URI_WORD = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@-]{1,64}")
_HOST = re.compile(r"(?:\*\.)?(?!-)[A-Za-z0-9-]{1,63}(?:\.(?!-)[A-Za-z0-9-]{1,63})*")


def server_names(names: Iterable[str]) -> list[str]:
    """Host names and addresses as a certificate holds them; "all interfaces" is no name and is left out."""
    return [name for name in map(_server_name, names) if name]


def _server_name(given: str) -> str:
    ip = address(given.strip("[]").partition("%")[0])
    if ip is not None:
        return "" if ip.is_unspecified else str(ip)
    try:
        name = given.rstrip(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise BadUsage(f"expected a host name or an IP address for the server certificate, got {given!r}")
    return name


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def host_names() -> list[str]:
    """This host's name, and the full one if the resolver knows it quickly."""
    found = [socket.gethostname()]

    def ask() -> None:
        with suppress(OSError, ValueError):
            found.append(socket.getfqdn())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(FQDN_WAIT_S)
    names: list[str] = []
    for name in tuple(found):
        with suppress(BadUsage):
            names += server_names([name])
    return names


def client_uris(name: str, tenant: str, roles: Sequence[str], principals: Sequence[str]) -> list[str]:
    """The URI SANs of a client certificate, in order; BadUsage for words that cannot stand in them."""
    for what, word in (("client name", name), ("tenant", tenant)):
        if not _NAME.fullmatch(word) or (word is tenant and word != word.lower()):
            raise BadUsage(
                f"expected a {what} of up to 63 letters (a tenant's are lower case), digits, '-', '_' and '.',"
                f" starting with a letter or digit, got {word!r}"
            )
    if name in WORDS:
        raise BadUsage(f"{name!r} already names something of the box itself; choose another client name")
    for word in (*roles, *principals):
        if not _URI_WORD.fullmatch(word):
            raise BadUsage(f"expected a role or principal of 1 to 64 URI characters, got {word!r}")
    return [
        identity_uri(tenant, name),
        *(f"osqbox-role:{role}" for role in roles),
        *(f"osqbox-principal:{principal}" for principal in principals),
    ]


def identity_uri(tenant: str, name: str) -> str:
    return f"osqbox://{tenant}/{name}"


def serial_text(serial: int) -> str:
    """Upper-case hexadecimal in whole bytes, as OpenSSL and Python's ssl print it."""
    digits = f"{serial:X}"
    return digits.zfill(len(digits) + len(digits) % 2)
