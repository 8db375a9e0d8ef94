"""The flag file that makes a real osqueryd a node of a box: ``osqueryd --flagfile FILE``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from osqbox.errors import BadSetup

ENDPOINTS = "/api/v1/osquery"
SECRET_VARIABLE = "OSQBOX_ENROLL_SECRET"  # noqa: S105 - its name
CONFIG_REFRESH_S = 10
LOG_PERIOD_S = 1
CARVE_BLOCK_BYTES = 1024 * 1024
SOCKET_PATH_BYTES = 100
"""A unix socket's path has to be shorter than 108 bytes on Linux and 104 elsewhere."""

_Section = tuple[str, dict[str, str | int]]


def flagfile(ready: Mapping[str, Any], *, client_cert: bool = False) -> str:
    """The text of the flag file for a box.

    ``ready`` is a ready object, of which ``agents`` is needed and ``ca``, ``enroll_secret_file``, ``client_cert``,
    ``client_key`` and ``data`` are used if they are there. With ``client_cert`` the agent presents the first
    client certificate; otherwise those flags are there as comments. Raises BadSetup for a path that a flag file
    cannot hold.
    """
    parts = (_head(ready), *(_section(*each) for each in _sections(ready)), _client_section(ready, on=client_cert))
    return "\n".join(part for part in parts if part)


def _head(ready: Mapping[str, Any]) -> str:
    return (
        f"# osqueryd flags for the osqbox at {ready['agents']}\n"
        "#   osqueryd --flagfile THIS_FILE\n"
        "# A flag given after --flagfile beats the one in here.\n"
    )


def _sections(ready: Mapping[str, Any]) -> Iterable[_Section]:
    yield _transport(ready)
    yield _enrollment(ready)
    yield (
        "Config from the box, asked for again every few seconds, and sooner after a failure than the default 300 s.",
        {
            "config_plugin": "tls",
            "config_tls_endpoint": f"{ENDPOINTS}/config",
            "config_refresh": CONFIG_REFRESH_S,
            "config_accelerated_refresh": CONFIG_REFRESH_S,
        },
    )
    yield (
        "Results and status lines to the box, soon after they are there.",
        {
            "logger_plugin": "tls",
            "logger_tls_endpoint": f"{ENDPOINTS}/log",
            "logger_tls_period": LOG_PERIOD_S,
        },
    )
    yield (
        "Live queries. The box holds the read open until there is a query, so asking again at once costs little.",
        {
            "disable_distributed": "false",
            "distributed_plugin": "tls",
            "distributed_interval": 1,
            "distributed_tls_read_endpoint": f"{ENDPOINTS}/distributed/read",
            "distributed_tls_write_endpoint": f"{ENDPOINTS}/distributed/write",
        },
    )
    yield (
        "Carves: SELECT * FROM carves WHERE path = '...' AND carve = 1, or carve(path).",
        {
            "disable_carver": "false",
            "carver_disable_function": "false",
            "carver_start_endpoint": f"{ENDPOINTS}/carve/begin",
            "carver_continue_endpoint": f"{ENDPOINTS}/carve/block",
            "carver_block_size": CARVE_BLOCK_BYTES,
        },
    )
    yield "YARA rules are fetched with the node key; osquery 5.11 or newer.", {"yara_sigurl_authenticate": "true"}
    yield _own_files(ready)


def _transport(ready: Mapping[str, Any]) -> _Section:
    flags: dict[str, str | int] = {"tls_hostname": urlsplit(ready["agents"]).netloc}
    if ready.get("ca"):
        flags["tls_server_certs"] = ready["ca"]
    return "Where the box is, and the CA to trust; osqueryd cannot be told to trust blindly.", flags


def _enrollment(ready: Mapping[str, Any]) -> _Section:
    secret: dict[str, str | int] = {"enroll_secret_env": SECRET_VARIABLE}
    if ready.get("enroll_secret_file"):
        secret = {"enroll_secret_path": ready["enroll_secret_file"]}
    return (
        "Enrollment. Containers share their machine's uuid: give each --host_identifier=instance.",
        {**secret, "enroll_tls_endpoint": f"{ENDPOINTS}/enroll", "host_identifier": "uuid"},
    )


def _own_files(ready: Mapping[str, Any]) -> _Section:
    comment = "Apart from an osquery installed on this machine, whose node key and pidfile stay as they are."
    if not ready.get("data"):
        return comment, {}
    data = Path(ready["data"])
    flags: dict[str, str | int] = {
        "database_path": str(data / "osqueryd.db"),
        "pidfile": str(data / "osqueryd.pid"),
    }
    socket = str(data / "osqueryd.em")
    if len(socket.encode("utf-8", "surrogateescape")) <= SOCKET_PATH_BYTES:
        flags["extensions_socket"] = socket
    return comment, flags


def _client_section(ready: Mapping[str, Any], *, on: bool) -> str:
    if not (ready.get("client_cert") and ready.get("client_key")):
        return ""
    flags: dict[str, str | int] = {"tls_client_cert": ready["client_cert"], "tls_client_key": ready["client_key"]}
    comment = "A client certificate, for a box that asks for one (serve --client-auth required)."
    return _section(comment, flags, prefix="" if on else "# ")


def _section(comment: str, flags: Mapping[str, str | int], prefix: str = "") -> str:
    if not flags:
        return ""
    return "".join([f"# {comment}\n", *(f"{prefix}--{name}={_value(value)}\n" for name, value in flags.items())])


def _value(value: str | int) -> str:
    """gflags takes the rest of the line as it is, so nothing is quoted and no value spans lines."""
    text = str(value)
    if text != text.strip() or any(letter in text for letter in "\r\n\0"):
        raise BadSetup(f"expected a path without line ends or blanks around it, got {text!r}")
    return text
