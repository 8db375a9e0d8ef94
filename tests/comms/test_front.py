"""The comms API as part of a box: what is open, what is told, what is gone afterwards, what a start refuses."""

from __future__ import annotations

import json
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from osqbox.box import Box, open_box
from osqbox.certs import ensure_identity, verbs
from osqbox.comms.front import _credentials
from osqbox.errors import BadSetup
from osqbox.listen.sockets import UNIX_PATH_BYTES
from osqbox.settings import CommsSettings, Settings

ES256 = CommsSettings(port=0, token_algorithm="ES256")


def run_box(tmp_path: Path, test: Callable[[Box], Awaitable[None]], comms: CommsSettings = ES256, **more: Any) -> None:
    async def main() -> None:
        settings = Settings(tmp_path / "data", tmp_path / "certs", agents_port=0, operator_port=0, comms=comms, **more)
        settings.data_dir.mkdir(exist_ok=True, parents=True)
        with trio.fail_after(40):
            async with open_box(settings) as box:
                await test(box)

    trio.run(main)


def test_the_ready_object_says_where_both_doors_are(tmp_path: Path) -> None:
    sockets: list[Path] = []

    async def test(box: Box) -> None:
        ready = box.ready()
        sockets.append(Path(ready["comms_socket"]))
        assert sockets[0] == box.settings.data_dir / "comms.sock"
        assert stat.S_IMODE(sockets[0].stat().st_mode) == 0o600
        tls = ssl.create_default_context(cafile=ready["ca"])
        async with httpx.AsyncClient(verify=tls, trust_env=False) as client:
            assert (await client.get(f"{ready['comms']}/api/v1")).json()["name"] == "osqbox"
        keys = list((tmp_path / "certs" / "comms-keys").iterdir())
        assert {stat.S_IMODE(file.stat().st_mode) for file in keys if file.suffix == ".key"} == {0o600}

    run_box(tmp_path, test)
    assert not sockets[0].exists()


def test_a_data_directory_with_a_long_path_has_its_socket_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["d" * 60] * 2)

    async def test(box: Box) -> None:
        path = Path(box.ready()["comms_socket"])
        assert len(str(path)) > UNIX_PATH_BYTES
        command = ["curl", "-sSf", "--unix-socket", path.name, "http://localhost/configuration"]
        done = await trio.run_process(command, capture_stdout=True, cwd=path.parent)
        assert json.loads(done.stdout)["groups"] == ["default"]

    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    run_box(folder, test)


async def is_served(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False


def test_a_revoked_certificate_is_refused_and_none_is_needed(tmp_path: Path) -> None:
    """As on the agents' listener."""
    certs = tmp_path / "certs"

    async def test(box: Box) -> None:
        url = box.ready()["comms"]
        strange = ssl.create_default_context(cafile=box.ready()["ca"])
        known = ssl.create_default_context(cafile=box.ready()["ca"])
        known.load_cert_chain(box.ready()["client_cert"], box.ready()["client_key"])
        async with (
            httpx.AsyncClient(verify=strange, trust_env=False) as without,
            httpx.AsyncClient(verify=known, trust_env=False) as revoked,
        ):
            assert (await revoked.get(url)).status_code == 200
            certificate = Path(box.ready()["client_cert"])
            await trio.to_thread.run_sync(partial(verbs.revoke, certs, certificate, now=box.clock.now()))
            while await is_served(revoked, url):
                await trio.sleep(0.05)
            assert not await is_served(revoked, url)
            assert (await without.get(url)).status_code == 200

    run_box(tmp_path, test)


@pytest.mark.parametrize(
    ("flags", "port", "algorithm"),
    [
        ([], 27000, "RS256"),
        (["--agents-port", "0", "--operator-port", "0"], 0, "RS256"),
        (["--comms-port", "5000", "--token-algorithm", "ES256"], 5000, "ES256"),
        (["--no-comms"], None, None),
    ],
)
def test_the_flags_of_serve(tmp_path: Path, flags: list[str], port: int | None, algorithm: str | None) -> None:
    from osqbox.cli.serve import command, settings_from

    options = command.make_context("serve", flags).params
    comms = settings_from(options, tmp_path, ephemeral=True).comms
    assert (comms and comms.port, comms and comms.token_algorithm) == (port, algorithm)


def test_the_indexers_password_comes_from_a_file_and_is_quoted_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("osqbox:se:cret\n")
    assert _credentials(file) == ("osqbox", "se:cret")
    for text in ("secret-without-a-user", ":secret", ""):
        file.write_text(text)
        with pytest.raises(BadSetup) as bad:
            _credentials(file)
        assert "secret" not in str(bad.value)
    with pytest.raises(BadSetup, match="cannot read"):
        _credentials(tmp_path / "absent")


def test_starting_a_box_imports_neither_jwt_nor_opensearch(tmp_path: Path) -> None:
    """They take a tenth of the start-up time each."""
    code = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from osqbox.box import open_box\n"
        "from osqbox.settings import CommsSettings, Settings\n"
        "async def main():\n"
        "    settings = Settings(Path(sys.argv[1]) / 'data', Path(sys.argv[1]) / 'certs', agents_port=0,\n"
        "                        operator_port=0, comms=CommsSettings(port=0))\n"
        "    settings.data_dir.mkdir()\n"
        "    async with open_box(settings):\n"
        "        print([name for name in ('jwt', 'opensearchpy', 'yaml') if name in sys.modules])\n"
        "trio.run(main)\n"
    )
    ensure_identity(tmp_path / "certs", names=(), key_type="ec", now=1_700_000_000.0)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
