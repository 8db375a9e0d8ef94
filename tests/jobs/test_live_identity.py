"""A box whose certificates end while somebody follows a job with them: by revocation and by time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from osqbox import audit
from osqbox import box as box_module
from osqbox.box import Box, open_box
from osqbox.certs import issue_client, revoke
from osqbox.clock import SystemClock
from osqbox.jobs.v1 import jobs_pb as pb
from osqbox.settings import JobSettings, Settings

SERVICE = "/osqbox.jobs.v1.JobService/"
DAY_S = 86_400


class AheadClock(SystemClock):
    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


class Client:
    """One identity over grpcio, called from threads."""

    def __init__(self, port: int, files: tuple[Path, Path, Path]) -> None:
        cert, key, ca = (file.read_bytes() for file in files)
        credentials = grpc.ssl_channel_credentials(ca, key, cert)
        self._channel = grpc.secure_channel(f"localhost:{port}", credentials)
        self.ended = threading.Event()
        self.code: Any = None

    def call(self, method: str, request: Any, answer: Any) -> Any:
        call = self._channel.unary_unary(SERVICE + method, request_serializer=bytes, response_deserializer=bytes)
        return answer.from_binary(call(request.to_binary(), timeout=10))

    def follow(self, job: str, began: threading.Event) -> None:
        """To the end, however it comes."""
        call = self._channel.unary_stream(
            SERVICE + "GetProcessOutput", request_serializer=bytes, response_deserializer=bytes
        )
        try:
            for _ in call(pb.ProcessOutputRequest(process_id=job).to_binary(), timeout=45):
                began.set()
        except grpc.RpcError as error:
            self.code = error.code()
        self.ended.set()

    def close(self) -> None:
        self._channel.close()


@contextlib.asynccontextmanager
async def opened(tmp_path: Path, clock: SystemClock) -> AsyncIterator[tuple[Box, Path]]:
    (tmp_path / "data").mkdir()
    certs = tmp_path / "certs"
    jobs = JobSettings(port=0)
    settings = Settings(tmp_path / "data", certs, agents_port=0, operator_port=0, jobs=jobs, ephemeral=True)
    with trio.fail_after(50):
        async with open_box(settings, clock=clock) as box:
            yield box, certs


async def refusals(box: Box, count: int) -> set[tuple[str, str, str]]:
    """What the audit says of refused certificates, once it says so many different things."""
    told: set[tuple[str, str, str]] = set()
    while len(told) < count:
        rows = await box.store.read(lambda db: audit.rows(db, action="connection.refuse"))
        told = {(row["actor"], row["subject"], row["result"]) for row in rows}
        assert all(row["serial"] and row["address"] for row in rows)
    return told


async def in_thread(function: Any, *args: Any) -> Any:
    return await trio.to_thread.run_sync(function, *args)


def test_revocation_and_expiry_end_live_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box_module, "IDENTITY_POLL_S", 0.05)
    clock = AheadClock()

    async def scenario() -> None:
        async with opened(tmp_path, clock) as (box, certs):
            assert box.jobs is not None
            port = box.jobs.port
            clients = {
                name: Client(port, issue_client(certs, name, days=days, roles=["operator"], now=time.time()))
                for name, days in (("stolen", 3), ("short", 1), ("kept", 3))
            }
            request = pb.RunProcessRequest(command=b"sh", args=[b"-c", b"echo up; sleep 60"])
            answer = await in_thread(clients["kept"].call, "RunProcess", request, pb.RunProcessResponse)
            job = answer.process_id
            async with trio.open_nursery() as nursery:
                for client in clients.values():
                    began = threading.Event()
                    nursery.start_soon(in_thread, client.follow, job, began)
                    assert await in_thread(began.wait, 15)
                await in_thread(lambda: revoke(certs, "stolen", now=time.time()))
                assert await in_thread(clients["stolen"].ended.wait, 15)
                assert not clients["short"].ended.is_set()

                clock.ahead_s = 2 * DAY_S
                assert await in_thread(clients["short"].ended.wait, 15)
                assert not clients["kept"].ended.is_set()

                for name in ("stolen", "short"):  # and new calls likewise
                    with pytest.raises(grpc.RpcError):
                        await in_thread(
                            clients[name].call, "ListProcesses", pb.ListProcessesRequest(), pb.ListProcessesResponse
                        )
                    assert clients[name].code is grpc.StatusCode.UNAVAILABLE
                refused = box.jobs.statistics().refused
                assert refused["certificate_revoked"] >= 2
                assert refused["certificate_expired"] >= 2

                stop = pb.StopProcessRequest(process_id=job)
                await in_thread(clients["kept"].call, "StopProcess", stop, pb.StopProcessResponse)
                assert await in_thread(clients["kept"].ended.wait, 15)
                assert clients["kept"].code is None
            assert box.jobs.statistics().errors == 0
            assert await refusals(box, 2) == {
                ("default/stolen", "jobs", "certificate_revoked"),
                ("default/short", "jobs", "certificate_expired"),
            }
            actors = {row["actor"] for row in box.store.peek(lambda db: audit.rows(db, action="job.run"))}
            assert actors == {"default/kept"}
            for client in clients.values():
                client.close()

    trio.run(scenario)


def test_a_certificate_with_an_unknown_role_is_told_and_written_down(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, SystemClock()) as (box, certs):
            assert box.jobs is not None
            client = Client(box.jobs.port, issue_client(certs, "eve", roles=["superuser"], now=time.time()))
            with pytest.raises(grpc.RpcError) as caught:
                await in_thread(client.call, "ListProcesses", pb.ListProcessesRequest(), pb.ListProcessesResponse)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "expected roles among runner, viewer, operator, admin, got 'superuser'" in error.details()
            assert await refusals(box, 1) == {("default/eve", "jobs", "UNKNOWN_ROLE")}
            client.close()

    trio.run(scenario)
