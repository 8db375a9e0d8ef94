"""The blocking client against a scripted service of ``grpcio``, and against peers that break the rules of HTTP/2."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # other tests start processes beside grpcio's threads

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
import trustme
from protobuf import Oneof
from protobuf.wkt.google.protobuf.duration_pb import Duration
from protobuf.wkt.google.protobuf.timestamp_pb import Timestamp

from osqbox.errors import BadSetup, BadUsage
from osqbox.jobs import grpc_h2
from osqbox.jobs.client import JobClient
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.grpc_h2 import Address, Channel, client_context
from osqbox.jobs.grpc_status import status_error
from osqbox.jobs.messages import (
    Chunk,
    Containment,
    End,
    JobSpec,
    Limits,
    OutputMode,
    OutputRequest,
    Overflow,
    Reason,
    State,
    Stream,
    Truncated,
)
from osqbox.jobs.v1 import error_details_pb as details
from osqbox.jobs.v1 import jobs_pb as pb

SERVICE = "osqbox.jobs.v1.JobService"
STREAMING = {"GetProcessOutput"}
LIMIT_S = 10.0


@dataclass(frozen=True)
class Files:
    """Certificates of one CA: a server's for localhost, a client's."""

    ca: Path
    cert: Path
    key: Path
    server_cert: bytes
    server_key: bytes


def certificates(directory: Path, server_name: str = "localhost") -> Files:
    authority = trustme.CA()
    server, client = authority.issue_cert(server_name), authority.issue_cert("alice@example.org")
    directory.mkdir(exist_ok=True)
    files = Files(
        directory / "ca.pem",
        directory / "alice.pem",
        directory / "alice.key",
        b"".join(part.bytes() for part in server.cert_chain_pems),
        server.private_key_pem.bytes(),
    )
    authority.cert_pem.write_to_path(files.ca)
    client.cert_chain_pems[0].write_to_path(files.cert)
    files.key.write_bytes(client.private_key_pem.bytes())
    files.key.chmod(0o600)
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def context(files: Files) -> ssl.SSLContext:
    return client_context(files.ca, files.cert, files.key)


@dataclass
class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers every method with what the script says, and can be asked what it saw.

    A script takes the requests of a call and its context, and gives answers as bytes.
    """

    scripts: dict[str, Callable[[list[bytes], Any], Any]] = field(default_factory=dict)
    seen: list[tuple[str, list[bytes]]] = field(default_factory=list)
    timeouts_s: list[float | None] = field(default_factory=list)

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]
        if not details.method.startswith(f"/{SERVICE}/") or name not in self.scripts:
            return None

        def answer(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            asked = list(requests)
            self.seen.append((name, asked))
            self.timeouts_s.append(context.time_remaining())
            given = self.scripts[name](asked, context)
            yield from given if name in STREAMING else [given]

        return grpc.stream_stream_rpc_method_handler(answer)


@contextmanager
def serving(files: Files, service: Service, port: int = 0) -> Iterator[int]:
    """A grpcio server on localhost; its port."""
    pool = futures.ThreadPoolExecutor(8)
    server = grpc.server(pool, handlers=[service])
    credentials = grpc.ssl_server_credentials(
        [(files.server_key, files.server_cert)], files.ca.read_bytes(), require_client_auth=True
    )
    bound = server.add_secure_port(f"127.0.0.1:{port}", credentials)
    server.start()
    try:
        yield bound
    finally:
        server.stop(0).wait(LIMIT_S)
        pool.shutdown()


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def port(files: Files, service: Service) -> Iterator[int]:
    with serving(files, service) as bound:
        yield bound


@pytest.fixture
def jobs(port: int, context: ssl.SSLContext) -> Iterator[JobClient]:
    with JobClient(lambda: Channel(Address("localhost", port), context), reconnect_s=LIMIT_S) as client:
        yield client


def wire_status(**members: Any) -> pb.ProcessStatus:
    facts: dict[str, Any] = {"process_id": "j1", "command": b"true", "state": pb.State.RUNNING, **members}
    return pb.ProcessStatus(**facts)


def answers(message: Any) -> Callable[[list[bytes], Any], bytes]:
    return lambda asked, context: message.to_binary()


def chunk(offset: int, data: bytes, stream: pb.Stream = pb.Stream.STDOUT) -> bytes:
    time = Timestamp(seconds=1700000000)
    return pb.ProcessOutput(
        event=Oneof("chunk", pb.Chunk(stream=stream, offset=offset, data=data, time=time))
    ).to_binary()


def ended(**members: Any) -> bytes:
    status = wire_status(state=pb.State.EXITED, result=Oneof("exit_code", 0), **members)
    return pb.ProcessOutput(event=Oneof("end", status)).to_binary()


# ---- calls -----------------------------------------------------------------------------------------------


def test_run_sends_every_word_of_the_spec_and_a_key_of_its_own(service: Service, jobs: JobClient) -> None:
    service.scripts["RunProcess"] = answers(pb.RunProcessResponse(process_id="j1", status=wire_status(pid=7)))
    spec = JobSpec(
        b"\xff/ls",
        (b"-la", b"", b"\x80"),
        env={"A": "ü"},
        cwd=b"/\xfe",
        run_as="alice",
        limits=Limits(1, 0.5, 1.5, 2, 3, 4),
        timeout_s=60.25,
        stop_grace_s=0.0,
        stop_signal=2,
        output_mode=OutputMode.MERGED,
        max_output_bytes=5,
        overflow=Overflow.KILL,
        open_stdin=True,
        keep_leftovers=True,
        link_output=True,
        labels={"a": "b"},
    )
    assert (jobs.run(spec).id, jobs.run(spec).pid) == ("j1", 7)
    first, second = (pb.RunProcessRequest.from_binary(asked[0]) for _, asked in service.seen)
    assert first.idempotency_key != second.idempotency_key
    assert len(first.idempotency_key) == 32
    first.idempotency_key = ""
    assert first == pb.RunProcessRequest(
        command=b"\xff/ls",
        args=[b"-la", b"", b"\x80"],
        env={"A": "ü"},
        working_dir=b"/\xfe",
        run_as="alice",
        limits=pb.Limits(
            memory_bytes=1,
            cpu_cores=0.5,
            cpu_time=Duration(seconds=1, nanos=500_000_000),
            processes=2,
            open_files=3,
            file_bytes=4,
        ),
        timeout=Duration(seconds=60, nanos=250_000_000),
        stop_grace=Duration(),
        stop_signal=2,
        output_mode=pb.OutputMode.MERGED,
        max_output_bytes=5,
        overflow=pb.OverflowPolicy.KILL,
        open_stdin=True,
        keep_leftovers=True,
        link_output=True,
        labels={"a": "b"},
    )


def test_a_status_in_the_runners_words(service: Service, jobs: JobClient) -> None:
    service.scripts["GetProcessStatus"] = answers(
        wire_status(
            owner="default/alice",
            run_as="root",
            args=[b"\xff"],
            state=pb.State.SIGNALED,
            result=Oneof("signaled", pb.Signaled(signal=9, core_dumped=True)),
            reason=pb.EndReason.STOPPED_BY_USER,
            stopped_by="bob",
            started_at=Timestamp(seconds=1, nanos=500_000_000),
            stdout_bytes=2**40,
            output_drained=True,
            containment=pb.Containment.CGROUP,
            enforced=["memory:cgroup1"],
            usage=pb.Usage(user_time=Duration(seconds=2), max_rss_bytes=3),
            labels={"a": "b"},
        )
    )
    status = jobs.status("j1")
    assert (status.state, status.signal, status.exit_code, status.errno) == (State.SIGNALED, 9, None, None)
    assert (status.reason, status.stopped_by, status.core_dumped) == (Reason.STOPPED, "bob", True)
    assert (status.started_at, status.ended_at, status.pid, status.args) == (1.5, None, None, (b"\xff",))
    assert (status.containment, status.enforced) == (Containment.CGROUP, ("memory:cgroup1",))
    assert (status.usage.user_s, status.usage.system_s, status.usage.max_rss_bytes) == (2.0, 0.0, 3)
    assert (status.stdout_bytes, status.labels) == (2**40, {"a": "b"})


def test_words_of_a_newer_server_do_no_harm(service: Service, jobs: JobClient) -> None:
    newer = wire_status().to_binary() + b"\x30\x63" + b"\x50\x63" + b"\xb0\x01\x63"  # state, reason, containment 99
    service.scripts["GetProcessStatus"] = lambda asked, context: newer
    status = jobs.status("j1")
    assert (status.id, status.state, status.reason, status.containment) == ("j1", State.PENDING, None, None)


def test_list_takes_pages_until_it_has_enough(service: Service, jobs: JobClient) -> None:
    def page(asked: list[bytes], context: Any) -> bytes:
        request = pb.ListProcessesRequest.from_binary(asked[0])
        assert request.states == [pb.State.RUNNING]
        first = int(request.page_token or 0)
        found = [wire_status(process_id=f"j{first + n}") for n in range(min(2, request.page_size))]
        return pb.ListProcessesResponse(processes=found, next_page_token=str(first + 2)).to_binary()

    service.scripts["ListProcesses"] = page
    assert [each.id for each in jobs.list(states=[State.RUNNING], limit=3)] == ["j0", "j1", "j2"]


def test_a_page_that_is_too_large_is_asked_for_in_parts(
    service: Service, jobs: JobClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command lines may have 2 MiB each; the channel is as good as before after each refusal."""
    monkeypatch.setattr(grpc_h2, "MESSAGE_BYTES", 100_000)

    def page(asked: list[bytes], context: Any) -> bytes:
        request = pb.ListProcessesRequest.from_binary(asked[0])
        first = int(request.page_token or 0)
        last = min(first + request.page_size, 10)
        found = [wire_status(process_id=f"j{n}", args=[bytes(40_000)]) for n in range(first, last)]
        return pb.ListProcessesResponse(processes=found, next_page_token=str(last) if last < 10 else "").to_binary()

    service.scripts["ListProcesses"] = page
    assert [each.id for each in jobs.list(limit=50)] == [f"j{n}" for n in range(10)]
    service.scripts["ListProcesses"] = lambda asked, context: bytes(200_000)
    with pytest.raises(JobError, match="at most 100000 bytes, got 200000"):
        jobs.list()


def test_stop_signal_suspend_and_resume(service: Service, jobs: JobClient) -> None:
    service.scripts["StopProcess"] = answers(pb.StopProcessResponse(status=wire_status(), already_ended=True))
    service.scripts["SignalProcess"] = answers(wire_status())
    service.scripts["DeleteProcess"] = answers(pb.DeleteProcessResponse())
    assert jobs.stop("j1", signal=2, grace_s=0.5, leader_only=True, strict=True)[1] is True
    jobs.signal("j1", 10)
    jobs.suspend("j1")
    jobs.resume("j1")
    jobs.delete("j1")
    requests = [asked[0] for _, asked in service.seen]
    grace = Duration(nanos=500_000_000)
    assert pb.StopProcessRequest.from_binary(requests[0]) == pb.StopProcessRequest(
        process_id="j1", signal=2, grace=grace, leader_only=True, strict=True
    )
    actions = [pb.SignalProcessRequest.from_binary(request).action for request in requests[1:4]]
    assert actions == [
        Oneof("signal", 10), Oneof("control", pb.Control.SUSPEND), Oneof("control", pb.Control.RESUME)
    ]  # fmt: skip


def test_a_deadline_is_kept_here_and_told_to_the_server(service: Service, port: int, context: ssl.SSLContext) -> None:
    """The channel is as good as before afterwards."""
    released = threading.Event()
    service.scripts["Slow"] = lambda asked, context: released.wait(LIMIT_S) and b""
    service.scripts["Quick"] = lambda asked, context: b"done"
    with Channel(Address("localhost", port), context) as channel:
        began = time.monotonic()
        with pytest.raises(JobError) as caught:
            channel.one_answer(f"/{SERVICE}/Slow", [b""], timeout_s=0.2)
        released.set()
        assert (caught.value.code, time.monotonic() - began < 2) == (Code.DEADLINE_EXCEEDED, True)
        assert channel.is_usable()
        assert channel.one_answer(f"/{SERVICE}/Quick", [b""], timeout_s=LIMIT_S) == b"done"
    assert service.timeouts_s[0] == pytest.approx(0.2, abs=0.2)


def test_wait_is_several_calls_until_the_end(
    service: Service, jobs: JobClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([pb.State.RUNNING, pb.State.RUNNING, pb.State.EXITED])
    service.scripts["WaitProcess"] = lambda asked, context: wire_status(state=next(states)).to_binary()
    assert jobs.wait("j1").state is State.EXITED
    assert len(service.seen) == 3


def test_wait_gives_up_when_told(service: Service, jobs: JobClient) -> None:
    def hold(asked: list[bytes], context: Any) -> bytes:
        wanted = pb.WaitProcessRequest.from_binary(asked[0]).timeout
        assert wanted is not None
        threading.Event().wait(wanted.to_seconds())
        return wire_status().to_binary()

    service.scripts["WaitProcess"] = hold
    assert jobs.wait("j1", 0.2).state is State.RUNNING
    assert len(service.seen) <= 2


@pytest.mark.parametrize("size", [0, 1, 48 * 1024, 48 * 1024 + 1, 5_000_000])
def test_input_of_any_size_arrives_whole(service: Service, jobs: JobClient, size: int) -> None:
    service.scripts["SendInput"] = answers(pb.SendInputResponse(accepted_bytes=size))
    data = os.urandom(size)
    jobs.send_input("j1", data, eof=True)
    chunks = [pb.InputChunk.from_binary(each) for each in service.seen[0][1]]
    assert b"".join(each.data for each in chunks) == data
    assert [each.eof for each in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_server_that_has_heard_enough_ends_the_sending(service: Service, port: int, context: ssl.SSLContext) -> None:
    """It refuses after the first of endless messages; the client neither hangs nor sends on."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield pb.InputChunk(data=bytes(48 * 1024)).to_binary()

    def refuse(request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "stdin is closed")

    service.service = lambda details: grpc.stream_unary_rpc_method_handler(refuse)  # type: ignore[method-assign]
    with Channel(Address("localhost", port), context) as channel, pytest.raises(JobError) as caught:
        channel.one_answer(f"/{SERVICE}/SendInput", endless(), timeout_s=LIMIT_S)
    assert (caught.value.code, caught.value.message, sent > 0) == (Code.FAILED_PRECONDITION, "stdin is closed", True)


# ---- output ----------------------------------------------------------------------------------------------


def test_output_in_the_runners_words(service: Service, jobs: JobClient) -> None:
    truncated = pb.ProcessOutput(event=Oneof("truncated", pb.Truncated(start=2, end=5))).to_binary()
    unknown = b"\x9a\x06\x00"  # field 99
    service.scripts["GetProcessOutput"] = lambda asked, context: [
        chunk(0, b"a\0"), truncated, unknown, chunk(5, b"\xff", pb.Stream.STDERR), chunk(6, b"b", pb.Stream.MERGED),
        ended(),
    ]  # fmt: skip
    first, gap, second, third, end = jobs.output("j1")
    assert first == Chunk(Stream.STDOUT, 0, b"a\0", 1700000000.0)
    assert gap == Truncated(2, 5)
    assert second == Chunk(Stream.STDERR, 5, b"\xff", 1700000000.0)
    assert third == Chunk(Stream.MIXED, 6, b"b", 1700000000.0)
    assert isinstance(end, End)
    assert end.status.exit_code == 0


def test_output_asks_for_what_is_wanted(service: Service, jobs: JobClient) -> None:
    service.scripts["GetProcessOutput"] = lambda asked, context: []
    assert list(jobs.output("j1", OutputRequest(streams=frozenset({Stream.STDERR}), follow=False, tail_bytes=0))) == []
    request = pb.ProcessOutputRequest.from_binary(service.seen[0][1][0])
    assert (request.streams, request.no_follow, request.has_field("tail_bytes")) == ([pb.Stream.STDERR], True, True)


def test_much_output_in_many_messages(service: Service, jobs: JobClient) -> None:
    """More than any window, so that flow control must give way again and again."""
    pieces = [os.urandom(64 * 1024) for _ in range(200)]

    def give(asked: list[bytes], context: Any) -> Iterator[bytes]:
        for number, piece in enumerate(pieces):
            yield chunk(number * 64 * 1024, piece)
        yield ended()

    service.scripts["GetProcessOutput"] = give
    got = b"".join(event.data for event in jobs.output("j1") if isinstance(event, Chunk))
    assert got == b"".join(pieces)


def test_output_goes_on_at_the_next_byte_after_a_break(files: Files, context: ssl.SSLContext) -> None:
    """The server ends in the middle, and comes back on the same port with a refusal first."""
    data = os.urandom(1000)
    offsets: list[int] = []
    breaks: list[str] = []
    aborted = False

    def give(asked: list[bytes], context: Any) -> Iterator[bytes]:
        nonlocal aborted
        offset = pb.ProcessOutputRequest.from_binary(asked[0]).offset
        offsets.append(offset)
        if offset == 0:
            yield chunk(0, data[:300])
            yield chunk(300, data[300:400])
            threading.Event().wait(0.1)
            restart.set()
            threading.Event().wait(0.2)
            return
        if not aborted:
            aborted = True
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        yield chunk(offset, data[offset:])
        yield ended()

    restart = threading.Event()
    service = Service({"GetProcessOutput": give})
    got: list[Any] = []
    with serving(files, service) as port:
        client = JobClient(
            lambda: Channel(Address("localhost", port), context),
            reconnect_s=LIMIT_S,
            on_break=lambda error: breaks.append(error.message),
        )
        thread = threading.Thread(target=lambda: got.extend(client.output("j1")), daemon=True)
        thread.start()
        assert restart.wait(LIMIT_S)
    with serving(files, service, port):
        thread.join(LIMIT_S)
    assert b"".join(event.data for event in got if isinstance(event, Chunk)) == data
    assert offsets == [0, 400, 400]
    assert isinstance(got[-1], End)
    assert breaks[-1] == "the server is stopping"


def test_a_stream_that_ends_before_the_job_is_taken_up_again(service: Service, jobs: JobClient) -> None:
    service.scripts["GetProcessOutput"] = lambda asked, context: [
        [chunk(0, b"ab")], [chunk(2, b"c"), ended()]
    ][min(len(service.seen) - 1, 1)]  # fmt: skip
    assert b"".join(event.data for event in jobs.output("j1") if isinstance(event, Chunk)) == b"abc"


def test_who_stops_listening_cancels_the_stream(service: Service, jobs: JobClient) -> None:
    cancelled = threading.Event()

    def give(asked: list[bytes], context: Any) -> Iterator[bytes]:
        context.add_callback(cancelled.set)
        yield chunk(0, b"a")
        cancelled.wait(LIMIT_S)

    service.scripts["GetProcessOutput"] = give
    with closing(jobs.output("j1")) as events:
        assert next(events)
    assert cancelled.wait(LIMIT_S)


# ---- refusals --------------------------------------------------------------------------------------------


def test_a_refusal_with_its_details(service: Service, jobs: JobClient) -> None:
    found: list[Any] = [
        details.ErrorInfo(reason="COMMAND_NOT_FOUND", domain="osqbox", metadata={"process_id": "j9", "x": "y"}),
        details.BadRequest(field_violations=[details.BadRequest.FieldViolation(field="command", description="x")]),
        details.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
    ]
    status = rpc_status(9, found)

    def refuse(asked: list[bytes], context: Any) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", status),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no command 'ü%'")

    service.scripts["RunProcess"] = refuse
    with pytest.raises(JobError) as caught:
        jobs.run(JobSpec(b"x"))
    error = caught.value
    assert (error.code, error.message, error.reason) == (
        Code.FAILED_PRECONDITION, "no command 'ü%'", "COMMAND_NOT_FOUND"
    )  # fmt: skip
    assert (error.field, error.job_id, error.retry_after_s) == ("command", "j9", 1.5)
    assert len(service.seen) == 1


def field_of(number: int, value: bytes) -> bytes:
    size = len(value)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + value


def rpc_status(code: int, found: list[Any]) -> bytes:
    packed = b"".join(
        field_of(
            3,
            field_of(1, f"type.googleapis.com/{each.desc().type_name}".encode()) + field_of(2, each.to_binary()),
        )
        for each in found
    )
    return bytes([8, code]) + packed


@pytest.mark.parametrize("details_base64", ["!", "AAAA", "GgUKA2FiYw", "x" * 100_000, "////", "CAUaAhoA"])
def test_details_that_nobody_can_read_are_left_out(details_base64: str) -> None:
    error = status_error(5, "no job", details_base64)
    assert (error.code, error.message, error.reason, error.job_id) == (Code.NOT_FOUND, "no job", "", None)


def test_a_status_that_is_none_of_ours() -> None:
    assert status_error(2, "boom").code is Code.INTERNAL
    assert "gRPC status 77" in status_error(77, "").message
    assert status_error(5, "").message == "not found"


def test_a_method_that_is_not_there(jobs: JobClient) -> None:
    with pytest.raises(JobError) as caught:
        jobs.status("j1")
    assert caught.value.code is Code.UNIMPLEMENTED


def test_an_answer_that_is_no_message(service: Service, jobs: JobClient) -> None:
    service.scripts["GetProcessStatus"] = lambda asked, context: b"\xff\xff"
    with pytest.raises(JobError, match="expected a ProcessStatus") as caught:
        jobs.status("j1")
    assert caught.value.code is Code.INTERNAL


def test_a_run_that_was_cut_off_is_asked_for_again_as_the_same_job(service: Service, jobs: JobClient) -> None:
    def first_refuse(asked: list[bytes], context: Any) -> bytes:
        if len(service.seen) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        return pb.RunProcessResponse(process_id="j1", status=wire_status()).to_binary()

    service.scripts["RunProcess"] = first_refuse
    assert jobs.run(JobSpec(b"true")).id == "j1"
    first, second = (pb.RunProcessRequest.from_binary(asked[0]) for _, asked in service.seen)
    assert first == second


@pytest.mark.parametrize(
    "call",
    [
        lambda jobs: jobs.send_input("j1", b"x"),
        lambda jobs: jobs.signal("j1", 10),
        lambda jobs: jobs.delete("j1"),
    ],
)
def test_what_must_not_be_done_twice_is_not_repeated(
    service: Service, jobs: JobClient, call: Callable[[JobClient], Any]
) -> None:
    def refuse(asked: list[bytes], context: Any) -> None:
        context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    service.scripts.update(dict.fromkeys(("SendInput", "SignalProcess", "DeleteProcess"), refuse))
    assert unavailable(lambda: call(jobs)).message == "the server is stopping"
    assert len(service.seen) == 1


# ---- reaching the server ---------------------------------------------------------------------------------


def unavailable(connect: Callable[[], Any]) -> JobError:
    began = time.monotonic()
    with pytest.raises(JobError) as caught:
        connect()
    assert caught.value.code is Code.UNAVAILABLE
    assert time.monotonic() - began < LIMIT_S
    return caught.value


def a_status(port: int, context: ssl.SSLContext, host: str = "localhost") -> Callable[[], Any]:
    def ask() -> Any:
        with JobClient(lambda: Channel(Address(host, port), context)) as client:
            return client.status("j1")

    return ask


def test_nobody_there_is_told_at_once(context: ssl.SSLContext) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    error = unavailable(a_status(port, context))
    assert (error.message, error.reason) == (f"nothing answers at localhost:{port}", grpc_h2.UNREACHABLE)


def test_a_server_of_another_ca_is_not_trusted(port: int, files: Files, tmp_path: Path) -> None:
    other = certificates(tmp_path)
    error = unavailable(a_status(port, client_context(other.ca, files.cert, files.key)))
    assert (error.reason, "not trusted" in error.message) == (grpc_h2.UNTRUSTED, True)


def test_a_server_of_another_name_is_not_trusted(port: int, context: ssl.SSLContext) -> None:
    error = unavailable(a_status(port, context, "127.0.0.1"))
    assert error.reason == grpc_h2.UNTRUSTED
    assert "127.0.0.1" in error.message


def test_a_certificate_that_the_server_does_not_take(port: int, files: Files, tmp_path: Path) -> None:
    """In TLS 1.3 the client hears of it only when it reads; it is told at once, not tried again for a minute."""
    other = certificates(tmp_path)
    error = unavailable(a_status(port, client_context(files.ca, other.cert, other.key)))
    assert error.reason in (grpc_h2.REFUSED_CERTIFICATE, grpc_h2.UNWELCOME)


def test_tls_1_2_is_refused_by_the_client_itself(files: Files, context: ssl.SSLContext) -> None:
    with tls_peer(files, lambda tls: None, most=ssl.TLSVersion.TLSv1_2) as port:
        error = unavailable(a_status(port, context))
    assert (error.reason, error.message) == (grpc_h2.UNTRUSTED, f"localhost:{port} does not speak TLS 1.3")


def test_a_server_that_is_not_for_http_2(files: Files, context: ssl.SSLContext) -> None:
    with tls_peer(files, lambda tls: None, alpn="http/1.1") as port:
        error = unavailable(a_status(port, context))
    assert "does not speak gRPC" in error.message


@pytest.mark.parametrize(
    "text", ["", "localhost", "localhost:", ":1", "localhost:0", "localhost:70000", "::1:5", "a:b"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(BadUsage, match="HOST:PORT"):
        Address.parse(text)


def test_addresses() -> None:
    assert (str(Address.parse("[::1]:9090")), Address.parse("[::1]:9090").host) == ("[::1]:9090", "::1")


def test_files_that_cannot_be_used(files: Files, tmp_path: Path) -> None:
    other = certificates(tmp_path / "other")
    text = tmp_path / "text"
    text.write_text("not PEM")
    for ca, cert, key in (
        (tmp_path / "none", files.cert, files.key),
        (text, files.cert, files.key),
        (files.ca, text, files.key),
        (files.ca, files.cert, other.key),
    ):
        with pytest.raises(BadSetup, match="cannot be used"):
            client_context(ca, cert, key)


def test_a_key_with_a_password_is_not_asked_for(files: Files, tmp_path: Path) -> None:
    """OpenSSL would ask the terminal, and a script would hang."""
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(files.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret")))
    with pytest.raises(BadSetup, match="has a password"):
        client_context(files.ca, files.cert, locked)


# ---- peers that break the rules --------------------------------------------------------------------------


@contextmanager
def tls_peer(
    files: Files,
    talk: Callable[[ssl.SSLSocket], None],
    *,
    alpn: str = "h2",
    most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> Iterator[int]:
    """A server that runs ``talk`` with every connection that gets through the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = most
    pem = files.ca.with_name("server.pem")
    pem.write_bytes(files.server_key + files.server_cert)
    context.load_cert_chain(pem)
    context.set_alpn_protocols([alpn])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                with suppress(OSError):
                    plain, _ = listener.accept()
                    plain.settimeout(LIMIT_S)
                    with context.wrap_socket(plain, server_side=True) as tls:
                        talk(tls)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            thread.join(LIMIT_S)


class RawPeer:
    """HTTP/2 by hand: waits for a whole request, then does as it is told."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self.tls = tls
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.http.initiate_connection()
        self.stream = 0
        self.flush()

    def flush(self) -> None:
        self.tls.sendall(self.http.data_to_send())

    def wait_for(self, *kinds: type) -> Any:
        while data := self.tls.recv(65536):
            for event in self.http.receive_data(data):
                if isinstance(event, kinds):
                    self.stream = getattr(event, "stream_id", 0)
                    return event
            self.flush()
        return None

    def head(self, *headers: tuple[str, str], end: bool = False) -> None:
        self.http.send_headers(self.stream, [(":status", "200"), *headers], end_stream=end)

    def say(self, message: bytes, *, compressed: int = 0, size: int | None = None) -> None:
        length = len(message) if size is None else size
        self.http.send_data(self.stream, bytes([compressed]) + length.to_bytes(4, "big") + message)

    def trail(self, status: str = "0") -> None:
        self.http.send_headers(self.stream, [("grpc-status", status)], end_stream=True)

    def linger(self) -> None:
        """Until the other side closes."""
        with suppress(OSError):
            while self.tls.recv(65536):
                pass


GRPC = ("content-type", "application/grpc")


def raw(script: Callable[[RawPeer], None]) -> Callable[[ssl.SSLSocket], None]:
    def talk(tls: ssl.SSLSocket) -> None:
        peer = RawPeer(tls)
        if peer.wait_for(h2.events.StreamEnded):
            script(peer)
            peer.flush()
            peer.linger()

    return talk


def _compressed(peer: RawPeer) -> None:
    peer.head(GRPC)
    peer.say(b"x", compressed=1)


def _huge(peer: RawPeer) -> None:
    peer.head(GRPC)
    peer.say(b"x", size=2**31)


def _cut_short(peer: RawPeer) -> None:
    peer.head(GRPC)
    peer.say(b"x", size=5)
    peer.trail()


def _no_status(peer: RawPeer) -> None:
    peer.head(GRPC, end=True)


def _two_messages(peer: RawPeer) -> None:
    peer.head(GRPC)
    peer.say(b"")
    peer.say(b"")
    peer.trail()


def _no_message(peer: RawPeer) -> None:
    peer.head(GRPC)
    peer.trail()


def _a_web_server(peer: RawPeer) -> None:
    peer.http.send_headers(peer.stream, [(":status", "404"), ("content-type", "text/html")])
    peer.http.send_data(peer.stream, b"<html>", end_stream=True)


def _one_status(peer: RawPeer) -> None:
    peer.head(GRPC)
    peer.say(wire_status().to_binary())
    peer.trail()


def _trailers_only(peer: RawPeer) -> None:
    peer.head(GRPC, ("grpc-status", "7"), ("grpc-message", "no%20way"), end=True)


def _reset(code: int) -> Callable[[RawPeer], None]:
    return lambda peer: peer.http.reset_stream(peer.stream, code)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (_compressed, Code.INTERNAL),
        (_huge, Code.INTERNAL),
        (_cut_short, Code.INTERNAL),
        (_no_status, Code.INTERNAL),
        (_two_messages, Code.INTERNAL),
        (_no_message, Code.INTERNAL),
        (_a_web_server, Code.UNIMPLEMENTED),
        (_trailers_only, Code.PERMISSION_DENIED),
        (_reset(7), Code.UNAVAILABLE),
        (_reset(8), Code.CANCELLED),
        (_reset(11), Code.RESOURCE_EXHAUSTED),
        (_reset(1), Code.INTERNAL),
    ],
)
def test_answers_that_are_not_as_they_should_be(
    files: Files, context: ssl.SSLContext, script: Callable[[RawPeer], None], code: Code
) -> None:
    with tls_peer(files, raw(script)) as port, Channel(Address("localhost", port), context) as channel:
        with pytest.raises(JobError) as caught:
            channel.one_answer(f"/{SERVICE}/GetProcessStatus", [b""], timeout_s=LIMIT_S)
        assert caught.value.code is code


def test_an_answer_byte_by_byte(files: Files, context: ssl.SSLContext) -> None:
    def talk(peer: RawPeer) -> None:
        peer.head(GRPC)
        peer.say(b"whole")
        peer.trail()
        for byte in peer.http.data_to_send():
            peer.tls.sendall(bytes([byte]))

    with tls_peer(files, raw(talk)) as port, Channel(Address("localhost", port), context) as channel:
        assert channel.one_answer(f"/{SERVICE}/GetProcessStatus", [b""], timeout_s=LIMIT_S) == b"whole"


@pytest.mark.parametrize("what", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\0" * 100])
def test_a_peer_that_does_not_speak_http_2(files: Files, context: ssl.SSLContext, what: bytes) -> None:
    with tls_peer(files, lambda tls: tls.sendall(what)) as port:
        error = unavailable(a_status(port, context))
    assert error.reason in (grpc_h2.BROKEN, grpc_h2.UNWELCOME)


def test_a_server_that_hangs_up_on_us_again_and_again_means_us(files: Files, context: ssl.SSLContext) -> None:
    """As a box does once our certificate is revoked: nobody waits a minute for it to change its mind."""
    calls = 0

    def talk(tls: ssl.SSLSocket) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raw(_one_status)(tls)

    with (
        tls_peer(files, talk) as port,
        JobClient(lambda: Channel(Address("localhost", port), context), reconnect_s=60) as client,
    ):
        assert client.status("j1").id == "j1"
        client.close()
        error = unavailable(lambda: client.status("j1"))
    assert (error.reason, "may not accept our certificate" in error.message) == (grpc_h2.UNWELCOME, True)
    assert calls > 3


def test_a_server_that_goes_away_is_asked_again(files: Files, context: ssl.SSLContext) -> None:
    asked = 0

    def talk(peer: RawPeer) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            peer.http.close_connection()
            return
        _one_status(peer)

    with tls_peer(files, raw(talk)) as port:
        assert a_status(port, context)().id == "j1"
    assert asked == 2


def test_a_silent_server_is_asked_for_a_sign_of_life(
    files: Files, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that answers pings may take as long as it likes; one that does not is given up."""
    monkeypatch.setattr(grpc_h2, "SILENCE_S", 0.3)
    pinged = 0

    def alive(peer: RawPeer) -> None:
        nonlocal pinged
        for _ in range(3):
            peer.wait_for(h2.events.PingReceived)
            pinged += 1
            peer.flush()
            peer.stream = 1
        _two_messages(peer)

    with tls_peer(files, raw(alive)) as port, Channel(Address("localhost", port), context) as channel:
        assert list(channel.call(f"/{SERVICE}/GetProcessOutput", [b""])) == [b"", b""]
    assert pinged == 3

    with tls_peer(files, raw(lambda peer: peer.linger())) as port:
        with Channel(Address("localhost", port), context) as channel, pytest.raises(JobError, match="silent") as caught:
            list(channel.call(f"/{SERVICE}/GetProcessOutput", [b""]))
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, grpc_h2.BROKEN)


def test_a_channel_that_was_closed_meanwhile_is_replaced(files: Files, context: ssl.SSLContext) -> None:
    """A server that restarts between two calls is not noticed; even a signal, which is never repeated, arrives."""
    service = Service({"SignalProcess": answers(wire_status())})
    with serving(files, service) as port:
        client = JobClient(lambda: Channel(Address("localhost", port), context), reconnect_s=0)
        client.signal("j1", 10)
    with serving(files, service, port), client:
        client.signal("j1", 10)
    assert [name for name, _ in service.seen] == ["SignalProcess"] * 2


def test_patience_ends(files: Files, context: ssl.SSLContext) -> None:
    service = Service({"GetProcessStatus": answers(wire_status())})
    breaks: list[JobError] = []
    with serving(files, service) as port:
        client = JobClient(
            lambda: Channel(Address("localhost", port), context), reconnect_s=0.3, on_break=breaks.append
        )
        client.status("j1")
    with client:
        error = unavailable(lambda: client.status("j1"))
    assert error.reason == grpc_h2.UNREACHABLE
    assert len(breaks) >= 2
