"""What a request may ask for, what an id looks like, and what follows which state."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.jobs import protocol
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.messages import (
    ENDED,
    MIB,
    Containment,
    JobSpec,
    Limits,
    OutputMode,
    OutputRequest,
    Reason,
    State,
    Status,
    Stream,
)

LS = JobSpec(b"ls", (b"-la",))
MOST = 1024 * MIB


def check(spec: JobSpec) -> JobSpec:
    return protocol.check_spec(spec, MOST)


def refusal(spec: JobSpec) -> JobError:
    with pytest.raises(JobError) as caught:
        check(spec)
    assert caught.value.code is Code.INVALID_ARGUMENT
    return caught.value


@given(st.binary(min_size=16, max_size=16))
def test_an_id_can_be_typed_and_is_never_taken_for_a_pid(random_bytes: bytes) -> None:
    job = protocol.new_id(random_bytes)
    protocol.check_id(job)
    assert (len(job), job[0].isalpha(), set(job) <= set(protocol.ID_CHARS)) == (protocol.ID_LENGTH, True, True)
    assert not protocol.is_pid(job)


def test_ids_of_different_randomness_differ() -> None:
    assert len({protocol.new_id(n.to_bytes(16, "big")) for n in range(5000)}) == 5000


@pytest.mark.parametrize("job", ["abcd", "k" * 26, "1", "4194304", "z9z9"])
def test_what_may_name_a_job(job: str) -> None:
    protocol.check_id(job)


@pytest.mark.parametrize(
    "job",
    ["", "abc", "0", "-1", "ABCD", "../../etc", "abcd ", "abcd\n", "12a4", "k" * 65, "é" * 8, "12345678901", "abcd~"],
)
def test_what_may_not(job: str) -> None:
    with pytest.raises(JobError) as caught:
        protocol.check_id(job)
    assert (caught.value.code, caught.value.field) == (Code.INVALID_ARGUMENT, "process_id")


def test_a_plain_request_gets_the_bound_of_the_server() -> None:
    assert check(LS) == replace(LS, max_output_bytes=MOST)
    assert check(replace(LS, max_output_bytes=5)).max_output_bytes == 5


BAD: list[tuple[str, JobSpec]] = [
    ("command", JobSpec(b"")),
    ("command", JobSpec(b"l\0s")),
    ("command", JobSpec(b"x" * 4096)),
    ("command", JobSpec("ls")),  # type: ignore[arg-type]
    ("args[1]", JobSpec(b"ls", (b"-la", b"\0"))),
    ("args[0]", JobSpec(b"ls", (b"x" * 128 * 1024,))),
    ("args", JobSpec(b"ls", (b"x" * 100_000,) * 30)),
    ("args", JobSpec(b"ls", (b"",) * 300_000)),
    ("working_dir", replace(LS, cwd=b"relative")),
    ("working_dir", replace(LS, cwd=b"")),
    ("working_dir", replace(LS, cwd=b"/\0")),
    ("env['1A']", replace(LS, env={"1A": ""})),
    ("env['']", replace(LS, env={"": ""})),
    ("env['A=B']", replace(LS, env={"A=B": ""})),
    ("env['A\\n']", replace(LS, env={"A\n": ""})),
    ("env['A']", replace(LS, env={"A": "\0"})),
    ("env['A']", replace(LS, env={"A": "\ud800"})),
    ("env['JOB_ID']", replace(LS, env={"JOB_ID": "another's"})),
    ("env['A']", replace(LS, env={"A": 1})),  # type: ignore[dict-item]
    ("output_mode", replace(LS, output_mode="loud")),  # type: ignore[arg-type]
    ("overflow", replace(LS, overflow=3)),  # type: ignore[arg-type]
    ("limits", replace(LS, limits=None)),  # type: ignore[arg-type]
    ("run_as", replace(LS, run_as="")),
    ("run_as", replace(LS, run_as="a\nb")),
    ("limits.memory_bytes", replace(LS, limits=Limits(memory_bytes=-1))),
    ("limits.memory_bytes", replace(LS, limits=Limits(memory_bytes=2**63))),
    ("limits.cpu_cores", replace(LS, limits=Limits(cpu_cores=0))),
    ("limits.cpu_cores", replace(LS, limits=Limits(cpu_cores=float("nan")))),
    ("limits.cpu_time_s", replace(LS, limits=Limits(cpu_time_s=-0.5))),
    ("limits.processes", replace(LS, limits=Limits(processes=0))),
    ("limits.open_files", replace(LS, limits=Limits(open_files=1.5))),  # type: ignore[arg-type]
    ("timeout", replace(LS, timeout_s=-1)),
    ("timeout", replace(LS, timeout_s=float("inf"))),
    ("stop_grace", replace(LS, stop_grace_s=-0.1)),
    ("stop_grace", replace(LS, stop_grace_s=float("nan"))),
    ("stop_signal", replace(LS, stop_signal=0)),
    ("stop_signal", replace(LS, stop_signal=65)),
    ("max_output_bytes", replace(LS, max_output_bytes=-1)),
    ("max_output_bytes", replace(LS, max_output_bytes=MOST + 1)),
    ("idempotency_key", replace(LS, idempotency_key="")),
    ("idempotency_key", replace(LS, idempotency_key="x" * 129)),
    ("labels['a b']", replace(LS, labels={"a b": ""})),
    ("labels['a']", replace(LS, labels={"a": "\x1b[2J"})),
    ("labels", replace(LS, labels={f"l{n}": "" for n in range(65)})),
]


@pytest.mark.parametrize(("field", "spec"), BAD, ids=[f"{field}-{n}" for n, (field, _) in enumerate(BAD)])
def test_bad_input_names_its_field(field: str, spec: JobSpec) -> None:
    error = refusal(spec)
    assert error.field == field
    assert len(error.message) < 300


def test_what_linux_takes_is_taken() -> None:
    spec = JobSpec(
        b"/bin/\xff\xfe", (b"", b"\x01\x80", b"x" * (128 * 1024 - 1)), {"LC_ALL": "\udcff é", "_": ""}, cwd=b"/tmp/\xff"
    )
    assert check(spec).args == spec.args


def test_the_same_request_has_the_same_digest_and_another_has_not() -> None:
    one = replace(LS, env={"A": "1", "B": "2"}, idempotency_key="k")
    assert protocol.digest(one) == protocol.digest(replace(LS, env={"B": "2", "A": "1"}, idempotency_key="other"))
    others = [replace(one, args=(b"-", b"la")), replace(one, env={"A": "2", "B": "2"}), replace(one, timeout_s=1),
              replace(one, cwd=b"/"), replace(one, limits=Limits(processes=3))]  # fmt: skip
    assert len({protocol.digest(spec) for spec in (one, *others)}) == 6


def test_an_offset_and_a_tail_exclude_each_other() -> None:
    protocol.check_output(OutputRequest(offset=3))
    protocol.check_output(OutputRequest(tail_bytes=0))
    for bad in (OutputRequest(offset=1, tail_bytes=1), OutputRequest(offset=-1), OutputRequest(tail_bytes=-1)):
        with pytest.raises(JobError) as caught:
            protocol.check_output(bad)
        assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("mode", "stream", "is_there"),
    [
        (OutputMode.SPLIT, Stream.STDOUT, True),
        (OutputMode.SPLIT, Stream.MIXED, False),
        (OutputMode.MERGED, Stream.MIXED, True),
        (OutputMode.MERGED, Stream.STDERR, False),
    ],
)
def test_a_stream_the_job_does_not_have_is_refused(mode: OutputMode, stream: Stream, is_there: bool) -> None:
    request = OutputRequest(streams=frozenset((stream,)))
    if is_there:
        protocol.check_streams(request, mode)
        return
    with pytest.raises(JobError) as caught:
        protocol.check_streams(request, mode)
    assert caught.value.code is Code.FAILED_PRECONDITION


RUNNING = Status("kkkk", "default/alice", "root", b"ls", (), State.RUNNING, 1.0)
EXITED: dict[str, Any] = {
    "state": "exited", "pid": 7, "started_at": 1.0, "ended_at": 2.0, "exit_code": 3, "reason": "exit",
    "output_bytes": 9, "stdout_bytes": 5, "stderr_bytes": 4, "output_truncated": True, "output_drained": False,
    "usage": {"user_s": 0.5, "system_s": 0.25, "max_rss_bytes": 4096}, "containment": "cgroup",
    "enforced": ["memory:cgroup1"], "leftover_processes": 2,
}  # fmt: skip


def test_what_the_keeper_tells_becomes_the_status() -> None:
    status = protocol.from_keeper(RUNNING, EXITED)
    assert (status.state, status.exit_code, status.reason) == (State.EXITED, 3, Reason.EXIT)
    assert (status.output_bytes, status.stdout_bytes, status.stderr_bytes) == (9, 5, 4)
    assert (status.output_truncated, status.output_drained, status.leftover_processes) == (True, False, 2)
    assert (status.containment, status.enforced) == (Containment.CGROUP, ("memory:cgroup1",))
    assert (status.id, status.owner, status.created_at) == ("kkkk", "default/alice", 1.0)


def test_a_job_that_has_ended_stays_as_it_ended() -> None:
    ended = protocol.from_keeper(RUNNING, EXITED)
    for state in State:
        if state is not State.EXITED:
            with pytest.raises(ValueError, match="told to be"):
                protocol.from_keeper(ended, {**EXITED, "state": state.value})


def test_no_state_comes_back_from_its_end() -> None:
    assert all(not protocol.AFTER[state] for state in ENDED)
    assert protocol.AFTER.keys() == set(State)
    assert all(State.PENDING not in after for after in protocol.AFTER.values())


@pytest.mark.parametrize(
    ("step", "number", "code", "reason"),
    [
        ("exec", errno.ENOENT, Code.FAILED_PRECONDITION, "COMMAND_NOT_FOUND"),
        ("exec", errno.EACCES, Code.FAILED_PRECONDITION, "NOT_EXECUTABLE"),
        ("exec", errno.ENOEXEC, Code.FAILED_PRECONDITION, "NOT_EXECUTABLE"),
        ("exec", errno.E2BIG, Code.INVALID_ARGUMENT, "ARGUMENTS_TOO_LONG"),
        ("cwd", errno.ENOENT, Code.FAILED_PRECONDITION, "BAD_WORKING_DIR"),
        ("cwd", errno.EACCES, Code.FAILED_PRECONDITION, "BAD_WORKING_DIR"),
        ("limits", 0, Code.FAILED_PRECONDITION, "LIMIT_NOT_ENFORCEABLE"),
        ("user", errno.EPERM, Code.FAILED_PRECONDITION, "CANNOT_SWITCH_USER"),
        ("fork", errno.EAGAIN, Code.RESOURCE_EXHAUSTED, "NO_RESOURCES"),
        ("log", errno.ENOSPC, Code.RESOURCE_EXHAUSTED, "NO_RESOURCES"),
        ("pipe", errno.EMFILE, Code.RESOURCE_EXHAUSTED, "NO_RESOURCES"),
    ],
)
def test_why_a_job_could_not_start_has_a_code(step: str, number: int, code: Code, reason: str) -> None:
    status = replace(RUNNING, state=State.FAILED_TO_START, errno=number)
    error = protocol.start_failure(status, {"step": step, "errno": number, "message": "why"})
    assert (error.code, error.reason, error.job_id) == (code, reason, "kkkk")
    assert (error.retry_after_s is not None) == (code is Code.RESOURCE_EXHAUSTED)


def test_a_long_command_line_is_cut_where_it_is_kept() -> None:
    assert protocol.shown_command(b"echo", (b"a", b"\xff")) == ["echo", "a", "\\xff"]
    assert sum(map(len, protocol.shown_command(b"echo", (b"x" * 1000,) * 100))) < 5000
