"""The methods of the job service as curl calls them: Connect's JSON over POST, and GET for what changes nothing."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
import trio

from osqbox.jobs.v1 import jobs_pb as wire

from .rig import JOBS, Pki, Served, serving, until


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=["h2", "http/1.1"])
def alpn(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(pki: Pki, alpn: str, scenario: Callable[[Served, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serving(pki) as served:
            context = pki.client_context("alice", alpn)
            async with httpx.AsyncClient(base_url=served.url, verify=context, http2=alpn == "h2", timeout=10) as client:
                await scenario(served, client)

    trio.run(main)


async def post(client: httpx.AsyncClient, method: str, /, **fields: Any) -> httpx.Response:
    return await client.post(JOBS + method, json=fields)


def envelopes(body: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    while body:
        flags, size = struct.unpack(">BI", body[:5])
        yield flags, json.loads(body[5 : 5 + size])
        body = body[5 + size :]


def envelope(**fields: Any) -> bytes:
    packed = json.dumps(fields).encode()
    return struct.pack(">BI", 0, len(packed)) + packed


def test_unary_methods(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        answer = await post(client, "RunProcess", argv=["sh", "-c", "echo hi; exit 3"], timeout="5s", labels={"a": "b"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        job = answer.json()["processId"]
        assert served.runner.specs[0].timeout_s == 5
        ended = (await post(client, "WaitProcess", process_id=job)).json()
        assert (ended["state"], ended["exitCode"], ended["labels"]) == ("STATE_EXITED", 3, {"a": "b"})
        assert base64.b64decode(ended["command"]) == b"sh"
        assert (await post(client, "GetProcessStatus", processId=job)).json() == ended
        assert (await post(client, "StopProcess", processId=job)).json() == {"status": ended, "alreadyEnded": True}
        query = {"encoding": "json", "message": json.dumps({"processId": job}), "connect": "v1"}
        assert (await client.get(JOBS + "GetProcessStatus", params=query)).json() == ended
        assert (await client.get(JOBS + "StopProcess", params=query)).status_code == 405
        assert (await post(client, "DeleteProcess", processId=job)).json() == {}
        assert (await post(client, "ListProcesses")).json() == {}

        raw = base64.b64encode(b"\xff\0").decode()
        assert (
            await post(client, "RunProcess", command=base64.b64encode(b"true").decode(), args=[raw])
        ).status_code == 500
        assert served.runner.specs[1].args == (b"\xff\0",)

    run(pki, alpn, scenario)


def test_output_streams(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        job = (await post(client, "RunProcess", argv=["sh", "-c", "echo one; sleep 0.05; echo two"])).json()[
            "processId"
        ]
        headers = {"content-type": "application/connect+json"}
        answer = await client.post(JOBS + "GetProcessOutput", content=envelope(processId=job), headers=headers)
        assert answer.status_code == 200
        *messages, (flags, trailer) = envelopes(answer.content)
        data = b"".join(base64.b64decode(each["chunk"]["data"]) for _, each in messages[:-1])
        assert (data, messages[-1][1]["end"]["exitCode"]) == (b"one\ntwo\n", 0)
        assert (flags, trailer) == (2, {})

        answer = await client.post(JOBS + "GetProcessOutput", content=envelope(processId="job-9"), headers=headers)
        ((flags, trailer),) = envelopes(answer.content)
        assert (answer.status_code, flags, trailer["error"]["code"]) == (200, 2, "not_found")

    run(pki, alpn, scenario)


def test_input_streams(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        job = (await post(client, "RunProcess", argv=["cat"], openStdin=True)).json()["processId"]
        data = base64.b64encode(b"in").decode()
        body = envelope(processId=job, data=data) + envelope(data=data, eof=True)
        headers = {"content-type": "application/connect+json"}
        answer = await client.post(JOBS + "SendInput", content=body, headers=headers)
        (_, accepted), (flags, trailer) = envelopes(answer.content)
        assert (accepted, flags, trailer) == ({"acceptedBytes": "4"}, 2, {})
        assert (await client.get(f"/api/v1/jobs/{job}/output")).content == b"inin"

    run(pki, alpn, scenario)


def test_grpc_web(pki: Pki, alpn: str) -> None:
    """What a browser speaks: the status is a last message."""

    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        def request(message: Any) -> dict[str, Any]:
            packed = message.to_binary()
            content = struct.pack(">BI", 0, len(packed)) + packed
            return {"content": content, "headers": {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}}

        answer = await client.post(JOBS + "RunProcess", **request(wire.RunProcessRequest(argv=["echo", "hi"])))
        size = int.from_bytes(answer.content[1:5], "big")
        job = wire.RunProcessResponse.from_binary(answer.content[5 : 5 + size]).process_id
        assert answer.content[5 + size] == 0x80
        assert b"grpc-status: 0" in answer.content[10 + size :]
        answer = await client.post(JOBS + "GetProcessOutput", **request(wire.ProcessOutputRequest(process_id=job)))
        assert b"hi\n" in answer.content
        answer = await client.post(JOBS + "GetProcessStatus", **request(wire.ProcessStatusRequest(process_id="job-9")))
        assert b"grpc-status: 5" in answer.content

    run(pki, alpn, scenario)


def test_errors(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        answer = await post(client, "RunProcess")
        told = answer.json()
        assert (answer.status_code, told["code"]) == (400, "invalid_argument")
        assert [each["type"] for each in told["details"]] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
        assert told["details"][1]["debug"]["fieldViolations"][0]["field"] == "command"
        answer = await post(client, "GetProcessStatus", processId="job-9")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        answer = await post(client, "Nope")
        assert (answer.status_code, answer.json()["code"]) == (404, "unimplemented")
        json_type = {"content-type": "application/json"}
        for body in (b"{", b"[]", b'{"argv": 5}', b"\xff"):
            answer = await client.post(JOBS + "RunProcess", content=body, headers=json_type)
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
        answer = await client.post(JOBS + "RunProcess", content=b"x" * 5_000_000, headers=json_type)
        assert (answer.status_code, answer.json()["code"]) == (429, "resource_exhausted")
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):  # what a page may send
            answer = await client.post(
                JOBS + "RunProcess", content=b'{"argv":["true"]}', headers={"content-type": kind}
            )
            assert answer.status_code == 415
        assert served.runner.specs == []

        served.runner.failure = ValueError("a secret detail")
        answer = await post(client, "GetProcessStatus", processId="job-0")
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert "secret" not in answer.text

    run(pki, alpn, scenario)


def test_deadline_and_departure(pki: Pki, alpn: str) -> None:
    async def scenario(served: Served, client: httpx.AsyncClient) -> None:
        job = (await post(client, "RunProcess", argv=["sleep", "60"])).json()["processId"]
        answer = await client.post(JOBS + "WaitProcess", json={"processId": job}, headers={"connect-timeout-ms": "100"})
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")

        headers = {"content-type": "application/connect+json"}
        with trio.move_on_after(0.2):
            await client.post(JOBS + "GetProcessOutput", content=envelope(processId=job), headers=headers)
        await client.aclose()  # httpx resets no HTTP/2 stream
        await until(lambda: served.runner.followers == 0, 1)

    run(pki, alpn, scenario)
