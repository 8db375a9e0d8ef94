"""The job service as a real grpcio client meets it: over TLS 1.3 with client certificates, real processes behind it."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from osqbox.jobs import rpc
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.library import open_jobs
from osqbox.jobs.v1 import jobs_pb

from .rig import JOBS, SERVICE, Messages, Pki, Served, details, serving, until


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


NAN = float("nan")
Scenario = Callable[[Served], Awaitable[None]]


def run(pki: Pki, scenario: Scenario) -> None:
    async def main() -> None:
        async with serving(pki) as served:
            await scenario(served)

    trio.run(main)


# what the methods do


def test_run_status_output_stop(pki: Pki) -> None:
    """The four methods of the base design."""

    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("sh", "-c", "printf 'a\\000\\377'; exec sleep 60")
        status = await alice.ask("GetProcessStatus", process_id=job)
        assert (status.owner, status.command, status.state) == ("default/alice", b"sh", 2)
        assert status.created_at.ToJsonString() == "2023-11-14T22:13:20.250Z"
        assert status.WhichOneof("result") is None

        stopped = await alice.ask("StopProcess", process_id=job, grace={"seconds": 5})
        assert (stopped.already_ended, stopped.status.signaled.signal) == (False, 15)
        assert (await alice.ask("StopProcess", process_id=job)).already_ended
        output, end = await alice.follow(process_id=job)
        assert output == b"a\0\xff"
        assert (end.state, end.reason, end.stopped_by) == (6, 2, "default/alice")

    run(pki, scenario)


def test_output_is_exact_and_its_end_carries_the_code(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("sh", "-c", "head -c 3000000 /dev/urandom | tee /dev/stderr | sha256sum; exit 3")
        output, end = await alice.follow(process_id=job)
        err, _ = await trio.to_thread.run_sync(
            lambda: ((all_of(alice.stream("GetProcessOutput", process_id=job, streams=[2]))), None)
        )
        assert hashlib.sha256(err).hexdigest().encode() in output
        assert (end.exit_code, end.stderr_bytes, end.output_bytes) == (3, 3000000, len(output))

        tail = await trio.to_thread.run_sync(
            lambda: list(alice.stream("GetProcessOutput", process_id=job, tail_bytes=9))
        )
        assert tail[0].chunk.data == output[-9:]
        assert tail[0].chunk.offset == len(output) - 9
        assert not tail[0].chunk.HasField("time")
        timed = alice.stream("GetProcessOutput", process_id=job, offset=len(output) - 1, timestamps=True)
        first = await trio.to_thread.run_sync(lambda: next(timed))
        assert first.chunk.time.ToJsonString() == "2023-11-14T22:13:21.500Z"

    run(pki, scenario)


def all_of(messages: Any) -> bytes:
    return b"".join(message.chunk.data for message in messages)


def test_a_follower_that_comes_late_sees_all_and_what_comes_next(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("cat", open_stdin=True)
        await send(alice, [{"process_id": job, "data": b"one "}])
        await until(lambda: served.runner.jobs[job].status.output_bytes == 4)
        stream = alice.stream("GetProcessOutput", process_id=job)
        assert (await trio.to_thread.run_sync(lambda: next(stream))).chunk.data == b"one "
        accepted = await send(alice, [{"process_id": job, "data": b"two"}, {"data": b"!", "eof": True}])
        assert accepted.accepted_bytes == 4
        rest = await trio.to_thread.run_sync(lambda: list(stream))
        assert b"".join(each.chunk.data for each in rest) == b"two!"
        assert rest[-1].end.exit_code == 0

    run(pki, scenario)


async def send(client: Any, chunks: list[dict[str, Any]]) -> Any:
    call, chunk = client.bound("SendInput")
    return await trio.to_thread.run_sync(lambda: call(iter([chunk(**each) for each in chunks]), timeout=10))


def test_list_signal_wait_delete(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        first = await alice.run("sleep", "60", labels={"kind": "long"})
        second = await alice.run("true")
        page = await alice.ask("ListProcesses", page_size=1)
        assert ([job.process_id for job in page.processes], page.next_page_token) == ([second], second)
        page = await alice.ask("ListProcesses", page_token=page.next_page_token)
        assert ([job.process_id for job in page.processes], page.next_page_token) == ([first], "")
        page = await alice.ask("ListProcesses", labels={"kind": "long"}, states=[2])
        assert [dict(job.labels) for job in page.processes] == [{"kind": "long"}]

        assert (await alice.ask("SignalProcess", process_id=first, control=1)).state == 3
        assert (await alice.ask("SignalProcess", process_id=first, control=2)).state == 2
        assert (await alice.ask("WaitProcess", process_id=first, timeout={"nanos": 10_000_000})).state == 2
        await alice.ask("SignalProcess", process_id=first, signal=9)
        assert (await alice.ask("WaitProcess", process_id=first)).signaled.signal == 9
        await alice.ask("DeleteProcess", process_id=first)
        assert (await alice.fails("GetProcessStatus", process_id=first)).code() is grpc.StatusCode.NOT_FOUND

    run(pki, scenario)


def test_a_page_of_long_command_lines_fits_into_a_message(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        jobs = [await alice.run("true", *[b"x" * 100_000] * 9) for _ in range(6)]
        found, token = [], ""
        while token or not found:
            page = await alice.ask("ListProcesses", page_token=token)
            assert page.ByteSize() < 3_000_000
            found += [job.process_id for job in page.processes]
            token = page.next_page_token
        assert found == jobs[::-1]

    run(pki, scenario)


def test_every_field_of_a_request_reaches_the_runner(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        await served.client().run(
            b"sh", b"-c", b"true # \xff", env={"A": "b"}, working_dir=b"/\xfe", run_as="root",
            limits={"memory_bytes": 1, "cpu_cores": 0.5, "cpu_time": {"seconds": 2}, "processes": 3, "open_files": 4,
                    "file_bytes": 5},
            timeout={"seconds": 1, "nanos": 500_000_000}, stop_grace={}, stop_signal=2, output_mode=1,
            max_output_bytes=7, overflow=1, open_stdin=True, keep_leftovers=True, idempotency_key="k",
            labels={"l": "m"}, link_output=True,
        )  # fmt: skip
        spec = served.runner.specs[0]
        assert (spec.command, spec.args, spec.env, spec.cwd, spec.run_as) == (
            b"sh", (b"-c", b"true # \xff"), {"A": "b"}, b"/\xfe", "root"
        )  # fmt: skip
        limits = spec.limits
        assert (limits.memory_bytes, limits.cpu_cores, limits.cpu_time_s, limits.processes) == (1, 0.5, 2.0, 3)
        assert (limits.open_files, limits.file_bytes) == (4, 5)
        assert (spec.timeout_s, spec.stop_grace_s, spec.stop_signal) == (1.5, 0.0, 2)
        assert (spec.output_mode, spec.max_output_bytes, spec.overflow) == ("merged", 7, "kill")
        assert (spec.open_stdin, spec.keep_leftovers, spec.idempotency_key, spec.labels, spec.link_output) == (
            True, True, "k", {"l": "m"}, True
        )  # fmt: skip

        await served.client().ask("RunProcess", argv=["sh", "-c", "echo ä"])
        spec = served.runner.specs[1]
        assert (spec.args, spec.timeout_s, spec.stop_grace_s, spec.stop_signal) == (
            (b"-c", "echo ä".encode()), None, 10.0, 15
        )  # fmt: skip

    run(pki, scenario)


def test_a_client_generated_with_strings_instead_of_bytes(pki: Pki) -> None:
    """`string command = 1; repeated string args = 2;` is the same on the wire."""

    def with_strings(file: Any) -> None:
        for message in file.message_type:
            for field in message.field:
                if field.name in ("command", "args", "working_dir"):
                    field.type = field.TYPE_STRING

    async def scenario(served: Served) -> None:
        client = served.client(messages=Messages(jobs_pb, SERVICE, with_strings))
        answer = await client.ask("RunProcess", command="echo", args=["grüße"])
        assert (answer.status.command, list(answer.status.args)) == ("echo", ["grüße"])
        assert (await client.follow(process_id=answer.process_id))[0] == "grüße\n".encode()

    run(pki, scenario)


# who


def test_another_identity_finds_nothing_and_in_the_same_words(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice, bob, carol = served.client(), served.client("bob"), served.client("carol", "viewer")
        job = await alice.run("cat", open_stdin=True)
        for method, fields in [
            ("GetProcessStatus", {}), ("StopProcess", {}), ("WaitProcess", {}), ("DeleteProcess", {}),
            ("SignalProcess", {"signal": 9}),
        ]:  # fmt: skip
            refused = await bob.fails(method, process_id=job, **fields)
            absent = await bob.fails(method, process_id="job-9", **fields)
            assert refused.code() is grpc.StatusCode.NOT_FOUND
            assert refused.details() == absent.details().replace("job-9", job)
            assert details(refused) == details(absent)
        with pytest.raises(grpc.RpcError, match="no job"):
            await bob.follow(process_id=job)
        with pytest.raises(grpc.RpcError, match="no job"):
            await send(bob, [{"process_id": job, "data": b"x"}])
        assert not (await bob.ask("ListProcesses")).processes

        assert (await carol.ask("GetProcessStatus", process_id=job)).owner == "default/alice"
        assert (await carol.fails("StopProcess", process_id=job)).code() is grpc.StatusCode.PERMISSION_DENIED
        assert served.runner.jobs[job].status.state == "running"

    run(pki, scenario)


def test_metadata_claims_nothing(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice, bob = served.client(), served.client("bob")
        job = await alice.run("sleep", "60")
        forged = [("owner", "default/alice"), ("x-user", "default/alice"), ("x-osqbox-role", "admin"),
                  ("x-forwarded-client-cert", "URI=osqbox://default/alice"), ("authorization", "Bearer x")]  # fmt: skip
        refused = await bob.fails("GetProcessStatus", process_id=job, options={"metadata": forged})
        assert refused.code() is grpc.StatusCode.NOT_FOUND
        answer = await bob.ask("RunProcess", command=b"true", options={"metadata": forged})
        assert answer.status.owner == "default/bob"

    run(pki, scenario)


# errors


@pytest.mark.parametrize(
    ("method", "fields", "code", "field"),
    [
        ("RunProcess", {}, "INVALID_ARGUMENT", "command"),
        ("RunProcess", {"command": b"a", "argv": ["a"]}, "INVALID_ARGUMENT", "argv"),
        ("RunProcess", {"command": b"a", "timeout": {"seconds": -1}}, "INVALID_ARGUMENT", "timeout"),
        ("RunProcess", {"command": b"a", "timeout": {"nanos": -1}}, "INVALID_ARGUMENT", "timeout"),
        ("RunProcess", {"command": b"a", "stop_grace": {"seconds": 2**60}}, "INVALID_ARGUMENT", "stop_grace"),
        ("RunProcess", {"command": b"a", "output_mode": 77}, "INVALID_ARGUMENT", "output_mode"),
        ("RunProcess", {"command": b"a", "overflow": -1}, "INVALID_ARGUMENT", "overflow"),
        ("RunProcess", {"command": b"a", "limits": {"cpu_cores": -1}}, "INVALID_ARGUMENT", "limits.cpu_cores"),
        ("RunProcess", {"command": b"a", "limits": {"cpu_cores": NAN}}, "INVALID_ARGUMENT", "limits.cpu_cores"),
        ("RunProcess", {"command": b"/no/such/program"}, "FAILED_PRECONDITION", "command"),
        ("ListProcesses", {"states": [0]}, "INVALID_ARGUMENT", "states"),
        ("SignalProcess", {"process_id": "job-0"}, "INVALID_ARGUMENT", "action"),
        ("SignalProcess", {"process_id": "job-0", "control": 0}, "INVALID_ARGUMENT", "action"),
        ("WaitProcess", {"process_id": "job-0", "timeout": {"seconds": -5}}, "INVALID_ARGUMENT", "timeout"),
        ("GetProcessStatus", {"process_id": ""}, "NOT_FOUND", None),
    ],
)  # fmt: skip
def test_bad_requests(pki: Pki, method: str, fields: dict[str, Any], code: str, field: str | None) -> None:
    async def scenario(served: Served) -> None:
        error = await served.client().fails(method, **fields)
        assert error.code().name == code
        told = details(error)
        assert (
            [each.field for each in told["BadRequest"].field_violations] == [field]
            if field
            else "BadRequest" not in told
        )
        assert told["ErrorInfo"].domain == "osqbox"
        assert told["ErrorInfo"].reason

    run(pki, scenario)


def test_bad_output_requests(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("true")
        await alice.ask("WaitProcess", process_id=job)
        for fields, code, field in [
            ({"offset": 1, "tail_bytes": 1}, "INVALID_ARGUMENT", "tail_bytes"),
            ({"streams": [0]}, "INVALID_ARGUMENT", "streams"),
            ({"offset": 1}, "OUT_OF_RANGE", "offset"),
        ]:
            with pytest.raises(grpc.RpcError) as raised:
                await alice.follow(process_id=job, **fields)
            assert raised.value.code().name == code
            assert [each.field for each in details(raised.value)["BadRequest"].field_violations] == [field]

    run(pki, scenario)


def test_bad_input_streams(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        job, other = await alice.run("cat", open_stdin=True), await alice.run("true")
        for chunks, code, accepted in [
            ([], "INVALID_ARGUMENT", "0"),
            ([{"data": b"x"}], "INVALID_ARGUMENT", "0"),
            ([{"process_id": job, "data": b"abc"}, {"process_id": other}], "INVALID_ARGUMENT", "3"),
            ([{"process_id": other, "data": b"x"}], "FAILED_PRECONDITION", "0"),
        ]:
            with pytest.raises(grpc.RpcError) as raised:
                await send(alice, chunks)
            assert raised.value.code().name == code
            assert details(raised.value)["ErrorInfo"].metadata["accepted_bytes"] == accepted

    run(pki, scenario)


def test_a_refusal_tells_when_to_come_back_and_which_row_was_kept(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        served.runner.failure = JobError(Code.RESOURCE_EXHAUSTED, "too many jobs", reason="JOBS", retry_after_s=2.5)
        error = await alice.fails("GetProcessStatus", process_id="job-0")
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() == 2500
        error = await alice.fails("RunProcess", command=b"/no/such/program")
        assert dict(details(error)["ErrorInfo"].metadata) == {"process_id": "job-0"}

    run(pki, scenario)


def test_a_bug_says_nothing_but_a_number(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        served.runner.failure = ValueError("a secret detail")
        error = await alice.fails("GetProcessStatus", process_id="job-0")
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(error)
        number = error.details().split()[2].rstrip(";")
        record = next(record for record in caplog.records if number in record.getMessage())
        assert record.exc_info is not None
        assert "a secret detail" in str(record.exc_info[1])

    caplog.set_level(logging.ERROR)
    run(pki, scenario)


def test_what_cannot_be_written_is_a_bug_as_well(pki: Pki) -> None:
    """Half a character, as JSON can carry it but protobuf cannot."""

    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("true")
        served.runner.jobs[job].update(stopped_by="secret \udc00")
        error = await alice.fails("GetProcessStatus", process_id=job)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert error.details().startswith("internal error")
        with pytest.raises(grpc.RpcError, match="internal error"):
            await alice.follow(process_id=job)
        served.runner.failure = JobError(Code.NOT_FOUND, "no file '\udcff'")
        assert (await alice.fails("GetProcessStatus", process_id=job)).details() == "no file '\\udcff'"

    run(pki, scenario)


def test_methods_and_messages_that_nobody_knows(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        channel = served.client().channel
        same = bytes
        for path in (JOBS + "Nope", "/other.Service/Method", "/x"):
            with pytest.raises(grpc.RpcError) as raised:
                await trio.to_thread.run_sync(lambda path=path: channel.unary_unary(path, same, same)(b"", timeout=5))
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for garbage in (b"\xff\xff", b"\x0a\x05ab"):
            with pytest.raises(grpc.RpcError) as raised:
                await trio.to_thread.run_sync(
                    lambda garbage=garbage: channel.unary_unary(JOBS + "RunProcess", same, same)(garbage, timeout=5)
                )
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(pki, scenario)


def test_sizes(pki: Pki) -> None:
    """Arguments of 2 MiB go through; a message of more than 4 MiB is refused, packed or not."""

    async def scenario(served: Served) -> None:
        alice = served.client()
        word = b"x" * 100_000
        job = await alice.run("true", *[word] * 20)
        assert len(served.runner.specs[0].args) == 20
        assert (await alice.ask("WaitProcess", process_id=job)).exit_code == 0
        packed = {"compression": grpc.Compression.Gzip}
        assert (await alice.ask("RunProcess", command=b"true", args=[word], options=packed)).process_id
        for options in ({}, packed):
            error = await alice.fails("RunProcess", command=b"true", args=[word] * 45, options=options)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(served.runner.specs) == 2
        assert (await alice.ask("GetProcessStatus", process_id=job)).process_id == job

    run(pki, scenario)


# waiting, leaving, stopping


def test_a_deadline_ends_the_call_on_both_sides(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("sleep", "60")
        error = await alice.fails("WaitProcess", process_id=job, within_s=0.2)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.RpcError) as raised:
            await alice.follow(process_id=job, within_s=0.2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: served.runner.followers == 0, 1)

    run(pki, scenario)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_who_leaves_is_gone_at_once(pki: Pki, how: str) -> None:
    async def scenario(served: Served) -> None:
        alice, other = served.client(), served.client()
        job = await alice.run("sleep", "60")
        streams = [alice.stream("GetProcessOutput", process_id=job) for _ in range(20)]
        await until(lambda: served.runner.followers == 20)
        if how == "cancel":
            for stream in streams:
                stream.cancel()
        else:
            alice.channel.close()
        await until(lambda: served.runner.followers == 0, 1)
        assert (await other.ask("GetProcessStatus", process_id=job)).state == 2

    run(pki, scenario)


def test_a_slow_reader_holds_up_nobody(pki: Pki) -> None:
    """It is held back by its window: what it does not read stays in the log, and its connection serves others."""

    async def scenario(served: Served) -> None:
        alice = served.client(options=(("grpc.max_receive_message_length", -1),))
        job = await alice.run("head", "-c", "20000000", "/dev/zero")
        await alice.ask("WaitProcess", process_id=job)
        slow = alice.stream("GetProcessOutput", process_id=job)
        await trio.to_thread.run_sync(lambda: next(slow))
        for _ in range(3):
            output, end = await alice.follow(process_id=job)
            assert (len(output), end.exit_code) == (20_000_000, 0)
        assert served.runner.followers == 1
        assert len(await trio.to_thread.run_sync(lambda: all_of(slow))) + 65536 >= 20_000_000

    run(pki, scenario)


def test_input_that_nobody_takes_holds_up_only_its_sender(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("sleep", "60", open_stdin=True)
        call, chunk = alice.bound("SendInput")
        left = threading.Event()
        sent: list[int] = []

        def flood() -> Any:
            yield chunk(process_id=job)
            while not left.is_set():
                sent.append(1)
                yield chunk(data=b"x" * 60_000)

        sending = call.future(flood(), timeout=20)
        await until(lambda: len(sent) > 1)
        for _ in range(50):
            await alice.ask("GetProcessStatus", process_id=job)
        await alice.run("true", b"y" * 100_000)
        assert len(sent) < 10  # a pipe, a window and buffers full, not all there is
        sending.cancel()
        left.set()
        assert (await alice.ask("StopProcess", process_id=job)).status.signaled.signal == 15

    run(pki, scenario)


def test_when_the_box_stops_what_waits_may_come_back(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        alice = served.client()
        job = await alice.run("sh", "-c", "echo here; exec cat", open_stdin=True)
        output = alice.stream("GetProcessOutput", process_id=job)
        assert (await trio.to_thread.run_sync(lambda: next(output))).chunk.data == b"here\n"
        wait = alice.bound("WaitProcess")[0].future(alice.bound("WaitProcess")[1](process_id=job), timeout=20)
        call, chunk = alice.bound("SendInput")
        left = threading.Event()

        def chunks() -> Any:
            yield chunk(process_id=job, data=b"x")
            left.wait(20)

        sending = call.future(chunks(), timeout=20)
        await until(lambda: served.runner.jobs[job].status.output_bytes == 6)
        served.stopping.set()
        errors = [
            await trio.to_thread.run_sync(error_of, each)
            for each in (lambda: list(output), wait.result, sending.result)
        ]
        left.set()
        errors.append(await alice.fails("GetProcessStatus", process_id=job))
        for error in errors:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert details(error)["RetryInfo"].retry_delay.ToSeconds() == 1
        assert served.runner.followers == 0

    run(pki, scenario)


def error_of(call: Any) -> grpc.RpcError:
    """Of a call in the background."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


def test_half_a_request_and_too_many_large_ones(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "REQUEST_TIMEOUT_S", 0.1)
    monkeypatch.setattr(rpc, "HELD_BYTES", 150_000)

    async def scenario(served: Served) -> None:
        channel = served.client().channel
        left = threading.Event()

        def never_ends() -> Any:
            left.wait(20)
            yield b""

        half = channel.stream_unary(JOBS + "GetProcessStatus", bytes, bytes).future(never_ends(), timeout=20)
        error = await trio.to_thread.run_sync(error_of, half.result)
        left.set()
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "whole request" in error.details()

        error = await served.client().fails("RunProcess", command=b"x" * 200_000)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error)["ErrorInfo"].reason == "REQUEST_MEMORY"
        assert await served.client().run("true", b"x" * 100_000)
        assert await served.client().run("true", b"x" * 100_000)  # the first has given back what it held

    run(pki, scenario)


# the real runner


def test_the_same_over_the_real_runner(pki: Pki, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_jobs(tmp_path / "jobs", stop_jobs=True) as jobs, serving(pki, jobs.runner) as served:
            await drive(served)

    async def drive(served: Served) -> None:
        alice, bob = served.client(), served.client("bob")
        job = await alice.run(
            "sh", "-c", "echo $0; head -c 700000 /dev/urandom | tee /dev/stderr | sha256sum; exit 3", b"\xff"
        )
        output, end = await alice.follow(process_id=job)
        assert (end.exit_code, end.stderr_bytes, end.output_bytes) == (3, 700_000, len(output))
        err = await trio.to_thread.run_sync(
            lambda: all_of(alice.stream("GetProcessOutput", process_id=job, streams=[2]))
        )
        assert hashlib.sha256(err).hexdigest().encode() in output
        assert b"\xff\n" in output
        rest = await trio.to_thread.run_sync(
            lambda: all_of(alice.stream("GetProcessOutput", process_id=job, offset=500_000))
        )
        assert rest == output[500_000:]

        held = await alice.run("cat", open_stdin=True)
        assert (
            await send(alice, [{"process_id": held, "data": b"z" * 200_000, "eof": True}])
        ).accepted_bytes == 200_000
        assert (await alice.follow(process_id=held))[0] == b"z" * 200_000

        long = await alice.run("sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done")
        stream = alice.stream("GetProcessOutput", process_id=long)
        assert (await trio.to_thread.run_sync(lambda: next(stream))).chunk.data == b"up\n"
        assert (await bob.fails("StopProcess", process_id=long)).code() is grpc.StatusCode.NOT_FOUND
        await alice.ask("StopProcess", process_id=long, grace={"nanos": 100_000_000})
        ended = await alice.ask("WaitProcess", process_id=long)
        assert (ended.signaled.signal, ended.reason, ended.stopped_by) == (9, 2, "default/alice")
        assert (await trio.to_thread.run_sync(lambda: list(stream)))[-1].end == ended
        assert (await alice.ask("StopProcess", process_id=long)).already_ended

        for words, reason in [((b"no-such-program",), "COMMAND_NOT_FOUND"), ((b"/etc/passwd",), "NOT_EXECUTABLE")]:
            error = await alice.fails("RunProcess", command=words[0])
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            info = details(error)["ErrorInfo"]
            assert info.reason == reason
            kept = await alice.ask("GetProcessStatus", process_id=info.metadata["process_id"])
            assert (kept.state, kept.start_failure.error_number > 0) == (7, True)
        assert (await alice.fails("GetProcessStatus", process_id="../x")).code() is grpc.StatusCode.INVALID_ARGUMENT

        waiting = await alice.run("sleep", "60")
        stream = alice.stream("GetProcessOutput", process_id=waiting)
        await until(lambda: served.runner.statistics().followers == 1)
        stream.cancel()
        await until(lambda: served.runner.statistics().followers == 0, 1)

    trio.run(main)
