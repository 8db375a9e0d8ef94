"""The real grpcurl, a Go program that knows nothing of our .proto: it learns the service by reflection."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from osqbox.testing import OsqboxServer

TOOLS = Path(__file__).resolve().parents[2] / ".ci" / "tools"
GRPCURL = shutil.which("grpcurl", path=f"{TOOLS}:{os.environ['PATH']}")
SERVICE = "osqbox.jobs.v1.JobService"

pytestmark = pytest.mark.skipif(
    GRPCURL is None,
    reason="needs grpcurl: go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4",
)


def grpcurl(
    server: OsqboxServer, *words: str, message: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    ready = server.box.ready()
    options = ["-cacert", ready["ca"], "-cert", ready["client_cert"], "-key", ready["client_key"]]
    if message is not None:
        options += ["-d", json.dumps(message)]
    return subprocess.run(
        [str(GRPCURL), *options, ready["jobs"], *words], capture_output=True, text=True, timeout=30, check=False
    )


def call(server: OsqboxServer, method: str, **message: Any) -> list[dict[str, Any]]:
    """Every message of the answer."""
    done = grpcurl(server, f"{SERVICE}/{method}", message=message)
    assert done.returncode == 0, done.stderr
    decoder, rest, found = json.JSONDecoder(), done.stdout.strip(), []
    while rest:
        each, end = decoder.raw_decode(rest)
        found.append(each)
        rest = rest[end:].strip()
    return found


def test_it_lists_and_describes_the_service(osqbox_server: OsqboxServer) -> None:
    assert SERVICE in grpcurl(osqbox_server, "list").stdout.split()
    methods = grpcurl(osqbox_server, "list", SERVICE).stdout.split()
    assert {
        f"{SERVICE}.{name}" for name in ("RunProcess", "StopProcess", "GetProcessStatus", "GetProcessOutput")
    } <= set(methods)
    assert "bytes command = 1;" in grpcurl(osqbox_server, "describe", "osqbox.jobs.v1.RunProcessRequest").stdout


def test_it_runs_follows_and_asks(osqbox_server: OsqboxServer) -> None:
    [ran] = call(osqbox_server, "RunProcess", argv=["sh", "-c", "echo one; sleep 0.2; echo two; exit 3"])
    events = call(osqbox_server, "GetProcessOutput", process_id=ran["processId"])
    assert b"".join(base64.b64decode(event["chunk"]["data"]) for event in events[:-1]) == b"one\ntwo\n"
    assert events[-1]["end"]["exitCode"] == 3
    [status] = call(osqbox_server, "GetProcessStatus", process_id=ran["processId"])
    assert (status["state"], status["owner"]) == ("STATE_EXITED", "default/client")


def test_its_errors_have_codes_and_details(osqbox_server: OsqboxServer) -> None:
    done = grpcurl(osqbox_server, f"{SERVICE}/GetProcessStatus", message={"process_id": "a" * 26})
    assert "Code: NotFound" in done.stderr
    assert "JOB_NOT_FOUND" in done.stderr
    done = grpcurl(osqbox_server, f"{SERVICE}/RunProcess", message={})
    assert "Code: InvalidArgument" in done.stderr
    assert '"field": "command"' in done.stderr
