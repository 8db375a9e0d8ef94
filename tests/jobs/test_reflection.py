"""Health and reflection, asked by Google's own clients; and the generated code against its .proto."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import osqbox.jobs.v1
from osqbox.jobs.v1 import health_pb, reflection_pb, reflection_v1alpha_pb

from .rig import SERVICE, Messages, Pki, Served, serving

FOLDER = Path(osqbox.jobs.v1.__file__).parent
SERVICES = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
            SERVICE]  # fmt: skip


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def run(pki: Pki, scenario: Callable[[Served], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serving(pki) as served:
            await scenario(served)

    trio.run(main)


# reflection


def test_a_client_that_knows_nothing_learns_the_service(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        channel = served.client().channel

        def learn() -> tuple[list[str], list[str], Any]:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            service = pool.FindServiceByName(SERVICE)
            return list(database.get_services()), [method.name for method in service.methods], pool

        services, methods, pool = await trio.to_thread.run_sync(learn)
        assert services == SERVICES
        assert methods == ["RunProcess", "StopProcess", "GetProcessStatus", "GetProcessOutput", "ListProcesses",
                           "SignalProcess", "WaitProcess", "SendInput", "DeleteProcess"]  # fmt: skip

        def look_up() -> list[str]:
            status = pool.FindMessageTypeByName("osqbox.jobs.v1.ProcessStatus")
            return [
                status.fields_by_name["created_at"].message_type.full_name,
                status.fields_by_name["state"].enum_type.name,
            ]

        assert await trio.to_thread.run_sync(look_up) == ["google.protobuf.Timestamp", "State"]

    run(pki, scenario)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ({"list_services": ""}, SERVICES),
        ({"file_by_filename": "osqbox/jobs/v1/jobs.proto"},
         ["osqbox/jobs/v1/jobs.proto", "google/protobuf/timestamp.proto", "google/protobuf/duration.proto"]),
        ({"file_by_filename": "google/protobuf/duration.proto"}, ["google/protobuf/duration.proto"]),
        ({"file_containing_symbol": "osqbox.jobs.v1.JobService.SendInput"}, "osqbox/jobs/v1/jobs.proto"),
        ({"file_containing_symbol": ".osqbox.jobs.v1.Chunk"}, "osqbox/jobs/v1/jobs.proto"),
        ({"file_containing_symbol": "osqbox.jobs.v1.Chunk.offset"}, "osqbox/jobs/v1/jobs.proto"),
        ({"file_containing_symbol": "osqbox.jobs.v1.ProcessStatus.result"}, "osqbox/jobs/v1/jobs.proto"),
        ({"file_containing_symbol": "osqbox.jobs.v1.STATE_LOST"}, "osqbox/jobs/v1/jobs.proto"),
        ({"file_containing_symbol": "grpc.health.v1.HealthCheckResponse.SERVING"}, "osqbox/jobs/v1/health.proto"),
        ({"file_containing_symbol": "google.rpc.BadRequest.FieldViolation"}, "osqbox/jobs/v1/error_details.proto"),
        ({"all_extension_numbers_of_type": "osqbox.jobs.v1.Chunk"}, "osqbox.jobs.v1.Chunk"),
        ({"all_extension_numbers_of_type": "no.Such"}, 5),
        ({"file_containing_extension": {"containing_type": "osqbox.jobs.v1.Chunk", "extension_number": 9}}, 5),
        ({"file_by_filename": "no.proto"}, 5),
        ({"file_containing_symbol": "no.Such"}, 5),
        ({}, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("module", [reflection_pb, reflection_v1alpha_pb])
def test_questions(pki: Pki, module: Any, question: dict[str, Any], answer: Any) -> None:
    service = module.desc().services[0].type_name

    async def scenario(served: Served) -> None:
        client = served.client(messages=Messages(module, service))
        call, request = client.bound("ServerReflectionInfo")
        asked = request(host="h", **question)
        got = await trio.to_thread.run_sync(lambda: list(call(iter([asked, asked]), timeout=10)))
        assert len(got) == 2
        assert got[0] == got[1]
        assert (got[0].valid_host, got[0].original_request) == ("h", asked)
        assert told(got[0]) == answer

    run(pki, scenario)


def told(response: Any) -> Any:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    match response.WhichOneof("message_response"):
        case "list_services_response":
            return [service.name for service in response.list_services_response.service]
        case "file_descriptor_response":
            files = response.file_descriptor_response.file_descriptor_proto
            names = [FileDescriptorProto.FromString(file).name for file in files]
            return names if "by_filename" in str(response.original_request) else names[0]
        case "all_extension_numbers_response":
            assert not response.all_extension_numbers_response.extension_number
            return response.all_extension_numbers_response.base_type_name
    return response.error_response.error_code


# health


def test_health_until_the_box_stops(pki: Pki) -> None:
    async def scenario(served: Served) -> None:
        client = served.client(messages=Messages(health_pb, "grpc.health.v1.Health"))
        for name in ("", SERVICE):
            assert (await client.ask("Check", service=name)).status == 1
        assert (await client.fails("Check", service="no.Such")).code() is grpc.StatusCode.NOT_FOUND
        listed = (await client.ask("List")).statuses
        assert {name: each.status for name, each in listed.items()} == dict.fromkeys(["", *SERVICES], 1)
        watch, unknown = client.stream("Watch", service=SERVICE), client.stream("Watch", service="no.Such")
        assert (await trio.to_thread.run_sync(next, watch)).status == 1
        assert (await trio.to_thread.run_sync(next, unknown)).status == 3
        served.stopping.set()
        assert (await trio.to_thread.run_sync(next, watch)).status == 2
        assert (await client.ask("Check")).status == 2

    run(pki, scenario)


# generated code


def test_generated_code_is_what_the_proto_files_make(tmp_path: Path) -> None:
    """After a change:  python -m grpc_tools.protoc -I. --py_out=. --py_opt=init_files=false osqbox/jobs/v1/*.proto"""
    plugin = shutil.which("protoc-gen-py", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if plugin is None or importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("needs grpcio-tools and protoc-gen-py")
    source = tmp_path / "osqbox" / "jobs" / "v1"
    shutil.copytree(FOLDER, source, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    files = sorted(str(file.relative_to(tmp_path)) for file in source.glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--plugin={plugin}", "-I.", "--py_out=.",
               "--py_opt=init_files=false", *files]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True, timeout=50)
    made = {file.name: code(file) for file in source.glob("*_pb.py")}
    assert len(made) == 5
    assert made == {file.name: code(file) for file in FOLDER.glob("*_pb.py")}


def code(file: Path) -> str:
    """Without the line that names the generator's version, which may be newer than the one used here."""
    installed, text = version("protoc-gen-py"), file.read_text()
    assert f"protoc-gen-py v{installed.split('.')[0]}." in text
    return "\n".join(line for line in text.splitlines() if not line.startswith("# Generated by"))
