"""What is in the wheel and in the sdist, and what must never be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECRET = re.compile(rb"-----BEGIN ([A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{40}")
UNWANTED = re.compile(
    r"(\.(pem|key|crt|p12|db|db-wal|db-shm|pyc|log|lock)|osqbox-stamp)$|(^|/)(\.venv|\.git|__pycache__)/"
)


def build(target: str, folder: Path) -> Path:
    """The archive hatchling makes of the working tree. Needs no network: the backend is among the test extras."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stderr
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Path to content, as installed into site-packages."""
    with zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Path inside the archive's one folder to content."""
    contents = {}
    with tarfile.open(build("sdist", tmp_path_factory.mktemp("sdist"))) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file:
                contents[member.name.split("/", 1)[1]] = file.read()
    return contents


def below(folder: str, suffix: str = "") -> dict[str, bytes]:
    """Files of the checkout, by their path in it."""
    files = (file for file in (ROOT / folder).rglob(f"*{suffix}") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in files}


def info(wheel: dict[str, bytes], name: str) -> str:
    (content,) = [content for path, content in wheel.items() if re.fullmatch(rf"osqbox-[^/]+\.dist-info/{name}", path)]
    return content.decode()


def test_the_wheel_holds_the_whole_package(wheel: dict[str, bytes]) -> None:
    sources = below("osqbox")
    assert "osqbox/py.typed" in sources
    assert {path: wheel.get(path) for path in sources} == sources


def test_the_wheel_holds_the_fixtures_inside_the_package(wheel: dict[str, bytes]) -> None:
    fixtures = {f"osqbox/{path}": content for path, content in below("fixtures").items()}
    assert "osqbox/fixtures/osquery_schema.json" in fixtures
    assert {path: wheel.get(path) for path in fixtures} == fixtures


def test_the_wheel_installs_nothing_beside_the_package(wheel: dict[str, bytes]) -> None:
    tops = {path.split("/")[0] for path in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"osqbox"}


def test_the_wheel_brings_the_command_and_the_pytest_plugin(wheel: dict[str, bytes]) -> None:
    entries = ConfigParser(delimiters="=")
    entries.read_string(info(wheel, r"entry_points\.txt"))
    found = {section: dict(entries[section]) for section in entries.sections()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found == {"console_scripts": project["scripts"], **project["entry-points"]}
    assert set(found["pytest11"]) == {"osqbox"}
    for entry in [*found["console_scripts"].values(), *found["pytest11"].values()]:
        module = entry.split(":")[0].replace(".", "/")
        assert {f"{module}.py", f"{module}/__init__.py"} & set(wheel), f"{entry} leads nowhere"


def test_the_wheel_works_without_the_checkout(wheel: dict[str, bytes], tmp_path: Path) -> None:
    for path, content in wheel.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    ask = "import osqbox, osqbox.schema; osqbox.schema.load_schema(); print(osqbox.__file__, osqbox.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50
    )
    version = HeaderParser().parsestr(info(wheel, "METADATA"))["Version"]
    assert answer.stdout.split() == [str(tmp_path / "osqbox/__init__.py"), version], answer.stderr


def test_the_licence_is_apache_and_in_both(wheel: dict[str, bytes], sdist: dict[str, bytes]) -> None:
    licence = (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in licence
    assert b"END OF TERMS AND CONDITIONS" in licence
    assert info(wheel, "licenses/LICENSE").encode() == sdist["LICENSE"] == licence
    assert HeaderParser().parsestr(info(wheel, "METADATA"))["License-Expression"] == "Apache-2.0"


def test_the_sdist_can_be_built_and_tested(sdist: dict[str, bytes]) -> None:
    wanted = {**below("osqbox", ".py"), **below("tests"), **below("fixtures"), **below("docs")}
    for name in ["osqbox.py", "pyproject.toml", "README.md", "CHANGELOG.md", "certs/README.md"]:
        wanted[name] = (ROOT / name).read_bytes()
    assert {path: sdist.get(path) for path in wanted} == wanted


@pytest.mark.parametrize("archive", ["wheel", "sdist"])
def test_nothing_private_or_generated_leaves_the_house(archive: str, request: pytest.FixtureRequest) -> None:
    contents: dict[str, bytes] = request.getfixturevalue(archive)
    assert [path for path in contents if UNWANTED.search(path)] == []
    assert [path for path, content in contents.items() if SECRET.search(content)] == []
