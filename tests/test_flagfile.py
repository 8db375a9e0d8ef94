"""The flag file: every flag is osqueryd's, every value is where osqueryd expects it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from osqbox.errors import BadSetup
from osqbox.flagfile import flagfile
from osqbox.osquery.protocol import route
from osqbox.schema import fixture_path

READY = {
    "agents": "https://localhost:8443",
    "ca": "/x y/ca.pem",
    "enroll_secret_file": "/x y/enroll_secret",
    "client_cert": "/c.pem",
    "client_key": "/c.key",
    "data": "/data",
}
FLAGS: dict[str, dict[str, Any]] = json.loads(fixture_path("osquery_flags.json").read_text())
CHECKS = {"string": str, "bool": {"true": True, "false": False}.__getitem__, "uint64": int, "uint32": int, "int32": int}


def flags(text: str) -> dict[str, str]:
    """As gflags reads a flag file."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, value = line.removeprefix("--").partition("=")
        assert line.startswith("--"), line
        assert name not in found, name
        found[name] = value
    return found


@pytest.mark.parametrize("client_cert", [False, True])
def test_every_flag_exists_and_has_a_value_of_its_type(client_cert: bool) -> None:
    """osqueryd ends at the first unknown flag; shell-only flags and aliases are not for files."""
    for name, value in flags(flagfile(READY, client_cert=client_cert)).items():
        assert FLAGS[name]["kind"] in ("cli_only", "option"), name
        CHECKS[FLAGS[name]["type"]](value)


def test_commented_flags_exist_too() -> None:
    """What a person uncomments has to work as well."""
    commented = [line.removeprefix("# ") for line in flagfile(READY).splitlines() if line.startswith("# --")]
    assert {line[2:].partition("=")[0] for line in commented} == {"tls_client_cert", "tls_client_key"}
    assert flags("\n".join(commented)) == {"tls_client_cert": "/c.pem", "tls_client_key": "/c.key"}


def test_endpoints_are_the_canonical_ones() -> None:
    """All under one path, which the box serves."""
    found = flags(flagfile(READY))
    endpoints = {name: value for name, value in found.items() if name.endswith("_endpoint")}
    assert endpoints == {
        "enroll_tls_endpoint": "/api/v1/osquery/enroll",
        "config_tls_endpoint": "/api/v1/osquery/config",
        "logger_tls_endpoint": "/api/v1/osquery/log",
        "distributed_tls_read_endpoint": "/api/v1/osquery/distributed/read",
        "distributed_tls_write_endpoint": "/api/v1/osquery/distributed/write",
        "carver_start_endpoint": "/api/v1/osquery/carve/begin",
        "carver_continue_endpoint": "/api/v1/osquery/carve/block",
    }
    assert len({route(endpoint).operation for endpoint in endpoints.values()} - {None}) == len(endpoints)


def test_what_a_box_needs_of_an_agent() -> None:
    """Plugins on, live queries at once, carves allowed, own database."""
    found = flags(flagfile(READY))
    expected = {
        "tls_hostname": "localhost:8443",
        "tls_server_certs": "/x y/ca.pem",
        "enroll_secret_path": "/x y/enroll_secret",
        "config_plugin": "tls",
        "logger_plugin": "tls",
        "distributed_plugin": "tls",
        "disable_distributed": "false",
        "distributed_interval": "1",
        "disable_carver": "false",
        "database_path": "/data/osqueryd.db",
        "pidfile": "/data/osqueryd.pid",
        "extensions_socket": "/data/osqueryd.em",
    }
    assert {name: found[name] for name in expected} == expected
    assert "tls_client_cert" not in found


def test_what_is_not_known_is_left_out() -> None:
    """A box behind a URL shows no files; the secret then comes from the environment."""
    found = flags(flagfile({"agents": "https://[::1]:9", "ca": None}))
    assert found["tls_hostname"] == "[::1]:9"
    assert found["enroll_secret_env"] == "OSQBOX_ENROLL_SECRET"
    assert not {"tls_server_certs", "enroll_secret_path", "database_path", "pidfile"} & set(found)


def test_a_socket_path_too_long_for_the_system_is_left_out() -> None:
    """osqueryd would fail to bind it."""
    found = flags(flagfile({**READY, "data": "/d" * 60}))
    assert "extensions_socket" not in found
    assert "pidfile" in found


def test_a_path_that_would_be_another_flag_is_refused() -> None:
    """A flag file has no quoting."""
    with pytest.raises(BadSetup, match="line ends"):
        flagfile({**READY, "ca": "/x\n--tls_dump=true"})


def test_it_reads_as_a_file(tmp_path: Path) -> None:
    """It ends with a line end, and each part says what it is for."""
    text = flagfile({**READY, "data": str(tmp_path)})
    assert text.endswith("\n")
    assert all(part.startswith("#") for part in text.split("\n\n"))
