"""Plain GET on the jobs listener, by an independent HTTP client, over HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
import pytest
import trio

from osqbox.jobs.errors import Code, JobError

from .rig import Pki, Served, serving, until


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["h2", "http/1.1"])
def alpn(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Get = Callable[..., Awaitable[httpx.Response]]
Scenario = Callable[[Served, httpx.AsyncClient], Awaitable[None]]


def run(pki: Pki, alpn: str, scenario: Scenario, name: str = "alice") -> None:
    async def main() -> None:
        async with serving(pki) as served:
            context = pki.client_context(name, alpn)
            async with httpx.AsyncClient(base_url=served.url, verify=context, http2=alpn == "h2", timeout=10) as client:
                await scenario(served, client)

    trio.run(main)


def test_list_and_status(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        alice, bob = served.client(), served.client("bob")
        job = await alice.run(b"sh", b"-c", b"exit 3 # \xff", labels={"kind": "x"})
        await alice.ask("WaitProcess", process_id=job)
        newer = await alice.run("sleep", "60")
        await bob.run("true")

        answer = await client.get(f"/api/v1/jobs/{job}")
        assert answer.headers["content-type"] == "application/json"
        facts = answer.json()
        assert list(facts) == [
            "id", "state", "owner", "run_as", "command", "args", "pid", "exit_code", "signal", "core_dumped", "errno",
            "reason", "stopped_by", "created_at", "started_at", "ended_at", "output_bytes", "stdout_bytes",
            "stderr_bytes", "output_truncated", "output_drained", "usage", "containment", "enforced",
            "leftover_processes", "labels",
        ]  # fmt: skip
        assert facts["id"] == job
        assert (facts["state"], facts["owner"], facts["exit_code"], facts["reason"]) == (
            "exited",
            "default/alice",
            3,
            "exit",
        )
        assert facts["args"] == ["-c", "exit 3 # \\xff"]
        assert facts["created_at"] == "2023-11-14T22:13:20.250000Z"

        listed = (await client.get("/api/v1/jobs")).json()
        assert ([each["id"] for each in listed["jobs"]], listed["next_page"]) == ([newer, job], None)
        assert listed["jobs"][1] == facts
        listed = (await client.get("/api/v1/jobs?state=exited&state=lost&label=kind=x&limit=5")).json()
        assert [each["id"] for each in listed["jobs"]] == [job]
        page = (await client.get("/api/v1/jobs?limit=1")).json()
        assert [each["id"] for each in page["jobs"]] == [newer]
        page = (await client.get("/api/v1/jobs", params={"before": page["next_page"]})).json()
        assert [each["id"] for each in page["jobs"]] == [job]

    run(pki, alpn, scenario)


def test_output_is_raw(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        alice = served.client()
        job = await alice.run("sh", "-c", "printf 'a\\000\\377'; sleep 0.05; printf err >&2")
        answer = await client.get(f"/api/v1/jobs/{job}/output")
        assert answer.content == b"a\0\xfferr"
        assert answer.headers["content-type"] == "application/octet-stream"
        assert (answer.headers["x-job-id"], answer.headers["x-output-truncated"]) == (job, "false")
        for query, expected in [
            ("stream=stderr", b"err"), ("stream=stdout&stream=stderr", b"a\0\xfferr"), ("offset=2", b"\xfferr"),
            ("tail=2", b"rr"), ("tail=99", b"a\0\xfferr"), ("follow=false&offset=6", b""),
        ]:  # fmt: skip
            assert (await client.get(f"/api/v1/jobs/{job}/output?{query}")).content == expected
        served.runner.jobs[job].status = replace(served.runner.jobs[job].status, output_truncated=True)
        assert (await client.get(f"/api/v1/jobs/{job}/output")).headers["x-output-truncated"] == "true"

    run(pki, alpn, scenario)


def test_output_is_followed_and_left(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        alice = served.client()
        job = await alice.run("sh", "-c", "echo one; exec sleep 60")
        await until(lambda: served.runner.jobs[job].status.output_bytes == 4)
        assert (await client.get(f"/api/v1/jobs/{job}/output?follow=false")).content == b"one\n"

        def look_and_leave() -> bytes:  # httpx's asynchronous client leaves its own generators behind
            context, target = pki.client_context("alice", alpn), f"{served.url}/api/v1/jobs/{job}/output"
            with httpx.Client(verify=context, http2=alpn == "h2") as own, own.stream("GET", target) as answer:
                pieces = answer.iter_raw()
                piece = next(pieces)
                assert served.runner.followers == 1
                return piece

        assert await trio.to_thread.run_sync(look_and_leave) == b"one\n"
        await until(lambda: served.runner.followers == 0, 1)

    run(pki, alpn, scenario)


def test_an_output_that_breaks_off_looks_like_one(pki: Pki, alpn: str) -> None:
    """The box stops: what was sent must not pass for all there is."""

    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        alice = served.client()
        job = await alice.run("sh", "-c", "echo one; exec sleep 60")
        async with (
            client.stream("GET", f"/api/v1/jobs/{job}/output") as broken,
            aclosing(broken.aiter_raw()) as pieces,
        ):
            assert await anext(pieces) == b"one\n"
            served.stopping.set()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(pieces)
        answer = await client.get(f"/api/v1/jobs/{job}")
        assert (answer.status_code, answer.headers["retry-after"], answer.json()["code"]) == (503, "1", "UNAVAILABLE")

    run(pki, alpn, scenario)


@pytest.mark.parametrize(
    ("target", "status", "code", "field"),
    [
        ("/api/v1/jobs/nope", 404, "NOT_FOUND", None),
        ("/api/v1/jobs/nope/output", 404, "NOT_FOUND", None),
        ("/api/v1/jobs/a/b/c", 404, "NOT_FOUND", None),
        ("/api/v1/jobs/a/other", 404, "NOT_FOUND", None),
        ("/api/v1/jobs/job-0?x=1", 400, "INVALID_ARGUMENT", "x"),
        ("/api/v1/jobs?state=odd", 400, "INVALID_ARGUMENT", "state"),
        ("/api/v1/jobs?label=x", 400, "INVALID_ARGUMENT", "label"),
        ("/api/v1/jobs?limit=0", 400, "INVALID_ARGUMENT", "limit"),
        ("/api/v1/jobs?limit=1&limit=2", 400, "INVALID_ARGUMENT", "limit"),
        ("/api/v1/jobs/job-0/output?offset=-1", 400, "INVALID_ARGUMENT", "offset"),
        ("/api/v1/jobs/job-0/output?offset=99999999999999999999", 400, "INVALID_ARGUMENT", "offset"),
        ("/api/v1/jobs/job-0/output?offset=1&tail=1", 400, "INVALID_ARGUMENT", "tail"),
        ("/api/v1/jobs/job-0/output?follow=perhaps", 400, "INVALID_ARGUMENT", "follow"),
        ("/api/v1/jobs/job-0/output?stream=stdin", 400, "INVALID_ARGUMENT", "stream"),
        ("/api/v1/jobs/job-0/output?offset=99", 416, "OUT_OF_RANGE", "offset"),
        ("/api/v1/jobs?" + "a=1&" * 200, 400, "INVALID_ARGUMENT", "query"),
    ],
)  # fmt: skip
def test_refusals(pki: Pki, target: str, status: int, code: str, field: str | None) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        job = await served.client().run("true")
        await served.client().ask("WaitProcess", process_id=job)
        answer = await client.get(target)
        facts = answer.json()
        assert (answer.status_code, facts["code"], facts["field"]) == (status, code, field)
        assert facts["error"]

    run(pki, "h2", scenario)


def test_another_owner_a_bug_and_another_method(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        job = await served.client().run("true")
        for target in (f"/api/v1/jobs/{job}", f"/api/v1/jobs/{job}/output"):
            seen, unseen = await client.get(target), await client.get(target.replace(job, "job-9"))
            assert (seen.status_code, seen.text.replace(job, "job-9")) == (404, unseen.text)
        assert (await client.get("/api/v1/jobs")).json() == {"jobs": [], "next_page": None}

        answer = await client.post("/api/v1/jobs", json={})
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
        assert (await client.get("/elsewhere")).status_code == 404

        served.runner.failure = ValueError("a secret detail")
        answer = await client.get(f"/api/v1/jobs/{job}")
        assert (answer.status_code, answer.json()["code"]) == (500, "INTERNAL")
        assert "secret" not in answer.text
        served.runner.failure = JobError(Code.RESOURCE_EXHAUSTED, "later", retry_after_s=7)
        answer = await client.get(f"/api/v1/jobs/{job}")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")

    run(pki, alpn, scenario, name="bob")


def test_facts_are_json(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        job = await served.client().run("true")
        raw: Any = (await client.get(f"/api/v1/jobs/{job}")).text
        assert raw.endswith("}\n")
        assert json.loads(raw)["id"] == job

    run(pki, alpn, scenario)
