"""Jobs over the operator API, with the real runner; a scripted one where a real job is too well-behaved."""

from __future__ import annotations

import base64
import hashlib
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from osqbox import audit
from osqbox.certs import ensure_identity, issue_client, revoke
from osqbox.identity import Identity
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.facts import status_facts
from osqbox.jobs.messages import Chunk, End, OutputRequest, State, Status, Stream, Truncated
from osqbox.jobs.runner import open_runner
from osqbox.operator import job_output
from osqbox.operator.jobs import JobFacts

EVENTS = {"Accept": "text/event-stream"}
Test = Callable[[Any], Awaitable[None]]


def with_runner(bare: Any, runner: Any) -> Any:
    rig = type(bare)(replace(bare.parts, jobs=runner), bare.clock, bare.stops, bare._nursery)
    rig.hosts = bare.hosts
    return rig


@pytest.fixture
def jobs(rig: Any, tmp_path: Path) -> Callable[[Test], None]:
    """As ``rig``, with a runner."""

    def run(test: Test) -> None:
        async def main(bare: Any) -> None:
            async with open_runner(bare.store, tmp_path / "jobs", bare.clock, stop_jobs=True) as runner:
                await test(with_runner(bare, runner))

        rig(main)

    return run


async def run_job(rig: Any, *argv: str, **options: Any) -> Any:
    return (await rig.post("/api/v1/jobs", {"command": argv[0], "args": list(argv[1:]), **options}, 201)).json


async def ended(rig: Any, job: str) -> Any:
    facts = (await rig.get(f"/api/v1/jobs/{job}/wait?timeout_s=20")).json
    assert facts["ended_at"] is not None
    return facts


# running and looking


def test_a_job_is_run_under_the_operators_name_and_audited(jobs: Callable[[Test], None]) -> None:
    async def test(rig: Any) -> None:
        job = await run_job(rig, "sh", "-c", "echo hello; exit 3", labels={"for": "test"})
        assert (job["owner"], job["labels"]) == ("operator", {"for": "test"})
        done = await ended(rig, job["id"])
        assert (done["state"], done["exit_code"], done["signal"], done["reason"]) == ("exited", 3, None, "exit")
        assert (done["stdout_bytes"], done["stderr_bytes"]) == (6, 0)
        assert (await rig.get(f"/api/v1/jobs/{job['id'][:8]}")).json == done
        rows = rig.store.peek(lambda db: audit.rows(db, subject=job["id"]))
        assert (rows[0]["actor"], rows[0]["action"]) == ("operator", "job.run")
        assert rows[0]["data"]["argv"] == ["sh", "-c", "echo hello; exit 3"]

    jobs(test)


def test_the_facts_of_a_job_are_those_that_the_document_describes() -> None:
    status = Status(
        "j1", "acme/alice", "nobody", b"/bin/\xff", (b"-a",), State.EXITED, 1.5, pid=7, started_at=2.0, ended_at=3.0,
        exit_code=0, output_bytes=5, stdout_bytes=5, enforced=("memory:cgroup2",), labels={"a": "b"},
    )  # fmt: skip
    facts = msgspec.to_builtins(msgspec.convert(status_facts(status), JobFacts))
    assert facts == status_facts(status)
    assert (facts["command"], facts["state"]) == ("/bin/\\xff", "exited")


def test_jobs_are_listed_by_state_owner_and_label_page_by_page(jobs: Callable[[Test], None]) -> None:
    async def test(rig: Any) -> None:
        made = [(await run_job(rig, "true", labels={"n": str(n)}))["id"] for n in range(3)]
        for job in made:
            await ended(rig, job)
        first = (await rig.get("/api/v1/jobs?limit=2&state=exited&state=running")).json
        rest = (await rig.get(f"/api/v1/jobs?limit=2&before={first['next_page']}")).json
        assert sorted(job["id"] for page in (first, rest) for job in page["jobs"]) == sorted(made)
        assert rest["next_page"] is None
        [one] = (await rig.get("/api/v1/jobs?label=n=1&owner=operator")).json["jobs"]
        assert one["id"] == made[1]
        assert (await rig.get("/api/v1/jobs?state=lost")).json["jobs"] == []

    jobs(test)


def test_a_job_is_suspended_resumed_signalled_fed_and_stopped(jobs: Callable[[Test], None]) -> None:
    async def test(rig: Any) -> None:
        job = (await run_job(rig, "cat", open_stdin=True))["id"]
        assert (await rig.post(f"/api/v1/jobs/{job}/suspend")).json["state"] == "suspended"
        assert (await rig.post(f"/api/v1/jobs/{job}/resume")).json["state"] == "running"
        raw = base64.b64encode(b"\xff\0").decode()
        assert (await rig.post(f"/api/v1/jobs/{job}/input", {"text": "typed "})).json == {"taken_bytes": 6}
        assert (await rig.post(f"/api/v1/jobs/{job}/input", {"data": raw, "eof": True})).json == {"taken_bytes": 2}
        assert (await ended(rig, job))["exit_code"] == 0
        assert (await rig.get(f"/api/v1/jobs/{job}/output")).body == b"typed \xff\0"

        sleeper = (await run_job(rig, "sleep", "60"))["id"]
        await rig.post(f"/api/v1/jobs/{sleeper}/signal", {"number": signal.SIGUSR1})
        done = await ended(rig, sleeper)
        assert (done["state"], done["signal"]) == ("signaled", signal.SIGUSR1)

        stubborn = (await run_job(rig, "sleep", "60"))["id"]
        stopped = (await rig.post(f"/api/v1/jobs/{stubborn}/stop", {"grace_s": 1})).json
        assert stopped["already_ended"] is False
        done = await ended(rig, stubborn)
        assert (done["reason"], done["stopped_by"]) == ("stopped", "operator")
        assert (await rig.post(f"/api/v1/jobs/{stubborn}/stop")).json["already_ended"] is True
        assert (await rig.delete(f"/api/v1/jobs/{stubborn}")).json == {"deleted": stubborn}
        await rig.get(f"/api/v1/jobs/{stubborn}", 404)

    jobs(test)


def test_a_wait_ends_with_the_time_and_with_the_box(jobs: Callable[[Test], None]) -> None:
    async def test(rig: Any) -> None:
        job = (await run_job(rig, "sleep", "60"))["id"]
        assert (await rig.get(f"/api/v1/jobs/{job}/wait?timeout_s=0.05")).json["state"] == "running"

        async def stop() -> None:
            await trio.testing.wait_all_tasks_blocked(0.05)
            rig.parts.stop()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            with trio.fail_after(20):
                answer = await rig.get(f"/api/v1/jobs/{job}/wait", 503)
        assert answer.json["reason"] == "stopping"

    jobs(test)


# output


def test_output_is_downloaded_byte_for_byte_from_anywhere(jobs: Callable[[Test], None], tmp_path: Path) -> None:
    everything = bytes(range(256)) * 2000
    (tmp_path / "bytes").write_bytes(everything)

    async def test(rig: Any) -> None:
        job = (await run_job(rig, "cat", str(tmp_path / "bytes")))["id"]
        await ended(rig, job)
        answer = await rig.get(f"/api/v1/jobs/{job}/output")
        assert hashlib.sha256(answer.body).digest() == hashlib.sha256(everything).digest()
        assert answer.headers["X-Output-Truncated"] == "false"
        assert answer.headers["Content-Disposition"] == f'attachment; filename="job-{job}.log"'
        assert (await rig.get(f"/api/v1/jobs/{job}/output?offset=511999")).body == b"\xff"
        assert (await rig.get(f"/api/v1/jobs/{job}/output?tail=3")).body == b"\xfd\xfe\xff"
        head = await rig.ask("HEAD", f"/api/v1/jobs/{job}/output", headers={"Authorization": "Bearer a-token-of-tests"})
        assert (head.status, head.body) == (200, b"")

    jobs(test)


def test_streams_are_told_apart(jobs: Callable[[Test], None]) -> None:
    async def test(rig: Any) -> None:
        job = (await run_job(rig, "sh", "-c", "echo out; echo err >&2"))["id"]
        await ended(rig, job)
        assert (await rig.get(f"/api/v1/jobs/{job}/output?stream=stderr")).body == b"err\n"
        events = (await rig.get(f"/api/v1/jobs/{job}/output", headers=EVENTS)).events
        assert {facts["stream"]: facts["text"] for name, _, facts in events if name == "chunk"} == {
            "stdout": "out\n",
            "stderr": "err\n",
        }
        name, _, facts = events[-1]
        assert (name, facts["job"]["exit_code"]) == ("end", 0)

    jobs(test)


def test_events_come_as_the_job_writes_and_resume_where_the_reader_was(
    jobs: Callable[[Test], None], stream: Any
) -> None:
    async def read_event(reader: Any) -> dict[str, str]:
        fields: dict[str, str] = {}
        while line := await reader.line() or not fields:
            if isinstance(line, str) and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
        return fields

    async def test(rig: Any) -> None:
        job = (await run_job(rig, "cat", open_stdin=True))["id"]
        path = f"/api/v1/jobs/{job}/output"
        async with rig.served() as client:
            async with stream(client, path, EVENTS) as reader:
                assert reader.headers["content-type"] == "text/event-stream"
                await rig.post(f"/api/v1/jobs/{job}/input", {"text": "first "})
                with trio.fail_after(20):
                    first = await read_event(reader)
            assert (first["event"], first["id"]) == ("chunk", "6")
            await rig.post(f"/api/v1/jobs/{job}/input", {"text": "second", "eof": True})
            answer = await client.get(path, headers={**EVENTS, "Last-Event-ID": first["id"]})
        chunks = [line for line in answer.text.splitlines() if line.startswith("data") and '"text"' in line]
        assert len(chunks) == 1
        assert '"text":"second"' in chunks[0]
        assert "event: end\nid: 12\n" in answer.text
        assert rig.parts.jobs.statistics().followers == 0

    jobs(test)


class Scripted:
    """A runner of one job, whose output is what a test says."""

    def __init__(self, *events: Any, refusal: JobError | None = None) -> None:
        self._events, self._refusal = events, refusal
        self.followers = 0
        self.asked: list[OutputRequest] = []

    async def status(self, job: str, caller: Any) -> Status:
        return Status("j1", "operator", "root", b"true", (), State.RUNNING, 1.0, output_truncated=True)

    @asynccontextmanager
    async def output(self, job: str, caller: Any, request: OutputRequest) -> AsyncIterator[AsyncIterator[Any]]:
        if self._refusal:
            raise self._refusal
        self.asked.append(request)
        self.followers += 1
        try:
            yield self._told()
        finally:
            self.followers -= 1

    async def _told(self) -> AsyncIterator[Any]:
        for event in self._events:
            if event is None:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
            yield event


def test_what_is_not_text_is_base64_and_what_is_missing_is_said(rig: Any) -> None:
    end = End(Status("j1", "operator", "root", b"true", (), State.EXITED, 1.0, exit_code=0, output_bytes=30))
    events = (Chunk(Stream.STDOUT, 0, b"\xc3", 1.0), Chunk(Stream.STDOUT, 1, "ü".encode(), 2.0), Truncated(3, 30), end)

    async def test(bare: Any) -> None:
        rig = with_runner(bare, runner := Scripted(*events))
        answer = await rig.get(
            "/api/v1/jobs/j1/output?offset=1&stream=stdout", headers={**EVENTS, "Last-Event-ID": "7"}
        )
        assert [(name, at) for name, at, _ in answer.events] == [
            ("chunk", "1"), ("chunk", "3"), ("truncated", "30"), ("end", "30"),
        ]  # fmt: skip
        told = [facts for _, _, facts in answer.events]
        assert (base64.b64decode(told[0]["base64"]), told[1]["text"]) == (b"\xc3", "ü")
        assert told[2] == {"start": 3, "end": 30}
        assert runner.asked[-1] == OutputRequest(7, None, frozenset((Stream.STDOUT,)), follow=True)
        download = await rig.get("/api/v1/jobs/j1/output")
        assert (download.body, download.headers["X-Output-Truncated"]) == (b"\xc3\xc3\xbc", "true")
        assert runner.asked[-1].follow is False

    rig(test)


def test_a_silent_job_keeps_its_followers_alive_and_a_stop_ends_them(
    rig: Any, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_output.Events, "silence_s", 0.02)

    async def test(bare: Any) -> None:
        rig = with_runner(bare, runner := Scripted(Chunk(Stream.STDOUT, 0, b"x", 1.0), None))
        async with rig.served() as client, stream(client, "/api/v1/jobs/j1/output", EVENTS) as reader:
            lines = [await reader.line() for _ in range(12)]
            assert lines.count(":") >= 3
            assert runner.followers == 1
            rig.parts.stop()
            with trio.fail_after(20):
                while await reader.line() is not None:
                    pass
        with trio.fail_after(20):
            while runner.followers:
                await trio.sleep(0.001)

    rig(test)


def test_a_follower_that_leaves_is_forgotten(rig: Any, stream: Any) -> None:
    async def test(bare: Any) -> None:
        rig = with_runner(bare, runner := Scripted(Chunk(Stream.STDOUT, 0, b"x", 1.0), None))
        async with rig.served() as client:
            async with stream(client, "/api/v1/jobs/j1/output?follow=1") as reader:
                assert await reader.read() == b"x"
                assert runner.followers == 1
            with trio.fail_after(20):
                while runner.followers:
                    await trio.sleep(0.001)

    rig(test)


# what is refused


def test_bad_input_is_told(jobs: Callable[[Test], None], tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")

    async def test(rig: Any) -> None:
        async def refused(body: Any, status: int) -> Any:
            return (await rig.post("/api/v1/jobs", body, status)).json

        assert "command" in (await refused({}, 400))["error"]
        assert (await refused({"command": ""}, 400))["reason"] == "invalid_field"
        assert (await refused({"command": "a\0b"}, 400))["reason"] == "invalid_field"
        assert (await refused({"command": "true", "shell": True}, 400))["reason"] == "bad_body"
        assert (await refused({"command": "true", "timeout_s": -1}, 400))["reason"] == "invalid_field"
        missing = await refused({"command": "no-such-program"}, 409)
        assert missing["reason"] == "command_not_found"
        assert (await rig.get(f"/api/v1/jobs/{missing['job']}")).json["state"] == "failed_to_start"
        assert (await refused({"command": str(tmp_path / "plain")}, 409))["reason"] == "not_executable"
        assert (await refused({"command": "true", "cwd": "/nonexistent"}, 409))["job"]
        assert (await refused({"command": "true", "run_as": "nobody"}, 403))["reason"] == "not_a_principal"
        for path in ("jobs/zzzz", "jobs/zzzz/output", "jobs/zzzz/wait"):
            assert (await rig.get(f"/api/v1/{path}", 404)).json["reason"] == "job_not_found"
        await rig.get("/api/v1/jobs?label=x", 400)
        await rig.get("/api/v1/jobs?before=nonsense", 400)
        await rig.get("/api/v1/jobs?state=nonsense", 400)
        job = (await run_job(rig, "echo", "x"))["id"]
        await ended(rig, job)
        assert (await rig.get(f"/api/v1/jobs/{job}/output?offset=3", 416)).json["reason"]
        await rig.get(f"/api/v1/jobs/{job}/output?offset=1&tail=1", 400)
        await rig.get(f"/api/v1/jobs/{job}/output?offset=-1", 400)
        await rig.post(f"/api/v1/jobs/{job}/suspend", status=409)
        await rig.post(f"/api/v1/jobs/{job}/input", {"text": "x"}, 409)
        await rig.post(f"/api/v1/jobs/{job}/input", {"text": "x", "data": "eA=="}, 400)
        await rig.post(f"/api/v1/jobs/{job}/stop", {"strict": True}, 409)

    jobs(test)


def test_deleting_a_running_job_is_refused(jobs: Callable[[Test], None]) -> None:
    async def test(rig: Any) -> None:
        job = (await run_job(rig, "sleep", "60"))["id"]
        await rig.delete(f"/api/v1/jobs/{job}", 409)

    jobs(test)


def test_what_is_busy_says_when_to_come_back(rig: Any) -> None:
    refusal = JobError(Code.RESOURCE_EXHAUSTED, "too many followers", reason="FOLLOWERS", retry_after_s=2.4)

    async def test(bare: Any) -> None:
        answer = await with_runner(bare, Scripted(refusal=refusal)).get("/api/v1/jobs/j1/output", 429)
        assert (answer.headers["Retry-After"], answer.json["reason"]) == ("2", "followers")

    rig(test)


def test_a_box_without_jobs_says_so(rig: Any) -> None:
    async def test(rig: Any) -> None:
        assert (await rig.get("/api/v1/jobs", 404)).json["reason"] == "no_jobs"
        assert (
            "osqbox_jobs"
            not in (
                await rig.ask("GET", "/metrics", headers={"Authorization": "Bearer a-token-of-tests"})
            ).body.decode()
        )

    rig(test)


# tokens and numbers


def test_a_login_token_is_made_once_and_not_kept(rig: Any) -> None:
    async def test(rig: Any) -> None:
        order = {"name": "alice", "roles": ["viewer"], "principals": ["www-data"], "valid_s": 3600, "ttl_s": 60}
        made = (await rig.post("/api/v1/certificates/tokens", order, 201)).json
        assert (made["name"], made["tenant"], made["roles"], made["valid_s"]) == ("alice", "default", ["viewer"], 3600)
        [row] = rig.store.peek(audit.rows)
        assert (row["actor"], row["action"], row["subject"]) == ("operator", "login.token", made["id"])
        assert made["token"] not in repr(row)
        for wrong in ({}, {"name": "al ice"}, {"name": "a", "roles": ["x"]}, {"name": "a", "ttl_s": 1e9}):
            await rig.post("/api/v1/certificates/tokens", wrong, 400)
        await rig.post("/api/v1/certificates/tokens", {"name": "a", "tenant": "nowhere"}, 404)

    rig(test)


def test_the_metrics_count_jobs(jobs: Callable[[Test], None]) -> None:
    async def test(rig: Any) -> None:
        done = (await run_job(rig, "true"))["id"]
        await ended(rig, done)
        await run_job(rig, "sleep", "60")
        text = (await rig.get("/metrics")).body.decode()
        assert "\nosqbox_jobs_running 1\n" in text
        assert '\nosqbox_jobs{state="exited"} 1\n' in text
        assert '\nosqbox_jobs{state="running"} 1\n' in text
        assert '\nosqbox_jobs{state="lost"} 0\n' in text

    jobs(test)


def test_the_metrics_tell_the_days_of_every_certificate(rig: Any, tmp_path: Path) -> None:
    certs, now = tmp_path / "certs", time.time()
    ensure_identity(certs, now=now)
    for name in ("alice", "bob"):
        issue_client(certs, name, days=0.5, now=now)
    revoke(certs, "bob", now=now)

    async def days(bare: Any) -> dict[tuple[str, str], float]:
        rig = type(bare)(replace(bare.parts, identity=Identity.in_directory(certs)), bare.clock, [], bare._nursery)
        lines = (await rig.get("/metrics")).body.decode().splitlines()
        found = [re.fullmatch(r'osqbox_certificate_expiry_days\{kind="(.+)",name="(.+)",serial="\w+"\} (.+)', line)
                 for line in lines]  # fmt: skip
        return {(each[1], each[2]): float(each[3]) for each in found if each}

    async def test(bare: Any) -> None:
        bare.clock.at = now
        told = await days(bare)
        assert told["client", "osqbox://default/alice"] == pytest.approx(0.5, abs=0.01)
        assert told["server", "CN=localhost"] == pytest.approx(397, abs=0.1)
        assert sorted(kind for kind, _ in told) == ["ca", "client", "client", "client-ca", "server"]
        bare.clock.at = now + 86_400
        assert (await days(bare))["client", "osqbox://default/alice"] == pytest.approx(-0.5, abs=0.01)
        (certs / "server.pem").write_text("half a renewal")
        (certs / "issued.json").write_text("nonsense")
        assert sorted(kind for kind, _ in await days(bare)) == ["ca", "client-ca"]

    rig(test)
