"""``osqbox.py``: a fresh machine, a prepared one, and everything that can go wrong in between.

The checkouts are small stand-ins whose own build backend needs no network; Python, venv and pip are real.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "osqbox.py"

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""

BACKEND = r"""
import os, pathlib, zipfile

METADATA = "Metadata-Version: 2.1\nName: osqbox\nVersion: 0.0.0\nProvides-Extra: test\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: backend\nRoot-Is-Purelib: true\nTag: py3-none-any\n"

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    if "GATE" in os.environ:
        open(os.environ["GATE"]).read()  # returns when the other end is closed
    name = "osqbox-0.0.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), "w") as wheel:
        wheel.writestr("osqbox.pth", str(pathlib.Path.cwd()))
        wheel.writestr("osqbox-0.0.0.dist-info/METADATA", METADATA)
        wheel.writestr("osqbox-0.0.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("osqbox-0.0.0.dist-info/RECORD", "")
    return name
"""

TELL = """
import json, os, sys
waited = os.environ.get("OSQBOX_WAITED")
print(json.dumps({"words": sys.argv[1:], "prefix": sys.prefix, "folder": os.getcwd(), "waited": waited}))
sys.exit(int(os.environ.get("EXIT", "0")))
"""


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "venv"
    subprocess.run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A checkout nothing was done in."""
    checkout = tmp_path / "check out"
    (checkout / "osqbox").mkdir(parents=True)
    shutil.copy(SCRIPT, checkout)
    (checkout / "pyproject.toml").write_text(PYPROJECT)
    (checkout / "backend.py").write_text(BACKEND)
    (checkout / "osqbox/__init__.py").touch()
    (checkout / "osqbox/__main__.py").write_text(TELL)
    (checkout / "pytest.py").write_text(TELL)
    return checkout


@pytest.fixture
def checkout(fresh: Path, empty_environment: Path) -> Path:
    """A checkout with an environment in which nothing is installed yet: saves each test the making of one."""
    shutil.copytree(empty_environment, fresh / ".venv", symlinks=True, copy_function=os.link)
    return fresh


@pytest.fixture
def front_door() -> ModuleType:
    spec = importlib.util.spec_from_file_location("front_door", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "OSQBOX_", "PYTHON"))}
    return {**kept, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **more}


def start(checkout: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, checkout / "osqbox.py", *words],
        cwd=checkout.parent,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def call(checkout: Path, *words: str, **more: str) -> tuple[int, Any, str]:
    """Exit code, what the program told, and what the front door said."""
    process = start(checkout, *words, **more)
    told, said = process.communicate(timeout=50)
    return process.returncode, json.loads(told) if told else None, said


def test_first_call_prepares_and_later_calls_start_at_once(fresh: Path) -> None:
    words = ["demo", "--name", "two words", ""]
    code, told, said = call(fresh, *words)
    assert (code, told["words"], told["prefix"]) == (0, words, str(fresh / ".venv")), said
    assert told["folder"] == str(fresh.parent), "the program runs where it was called"
    first, last = said.splitlines()
    assert first.startswith("osqbox: first run: installing osqbox and its libraries in")
    assert last.startswith("osqbox: ready after ")

    code, told, said = call(fresh, "serve", EXIT="7")
    assert (code, told["words"], told["waited"], said) == (7, ["serve"], None, "")


def test_the_test_verb_runs_pytest_in_the_checkout_with_the_words_that_follow(checkout: Path) -> None:
    code, told, said = call(checkout, "test", "-k", "some thing")
    assert (code, told["words"], told["folder"]) == (0, ["-k", "some thing"], str(checkout)), said
    assert (checkout / ".venv/osqbox-stamp").read_text().splitlines()[2] == "test"

    code, _, said = call(checkout, "serve")
    assert (code, said) == (0, ""), "what the tests need is enough for everything else"


def test_tests_are_added_to_an_environment_made_without_them(checkout: Path) -> None:
    call(checkout, "serve")
    code, _, said = call(checkout, "test")
    assert code == 0
    assert "adding the libraries of the test suite" in said


@pytest.mark.parametrize(
    ("words", "parallel"),
    [
        ([], True),
        (["-x", "--lf"], True),
        (["tests/test_front_door.py"], False),
        (["-k", "shell"], False),
        (["-n0"], False),
        (["--pdb"], False),
    ],
)
def test_the_whole_suite_uses_several_cores(
    front_door: ModuleType, monkeypatch: pytest.MonkeyPatch, words: list[str], parallel: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert front_door.test_words(words) == (["-n4", *words] if parallel else words)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert front_door.test_words(words) == words


def test_a_changed_project_is_installed_again_once(checkout: Path) -> None:
    call(checkout, "test")
    with (checkout / "pyproject.toml").open("a") as project:
        project.write("# one more library\n")
    code, _, said = call(checkout, "serve")
    assert code == 0
    assert "pyproject.toml has changed: updating" in said
    assert call(checkout, "test")[2] == "", "the libraries of the tests were kept up to date too"


def test_a_second_call_waits_for_the_first(checkout: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = start(checkout, "serve", GATE=str(gate))
    assert first.stderr
    assert "first run" in first.stderr.readline()
    opened = gate.open("w")  # returns once the build is under way
    second = start(checkout, "status")
    assert second.stderr
    try:
        assert f"another call (process {first.pid}) is preparing" in second.stderr.readline()
    finally:
        opened.close()
    told, said = second.communicate(timeout=50)
    assert (json.loads(told)["waited"], said) == ("1", "")
    told, _ = first.communicate(timeout=50)
    assert json.loads(told)["waited"] is None


def test_an_interrupted_call_is_taken_up_by_the_next(checkout: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    process = start(checkout, "serve", GATE=str(gate))
    assert process.stderr
    process.stderr.readline()
    opened = os.open(gate, os.O_RDWR)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=50)
    os.close(opened)
    assert (process.returncode, said) == (130, "osqbox: interrupted; the next call takes it up again\n")
    code, told, _ = call(checkout, "serve")
    assert (code, told["words"]) == (0, ["serve"])


def test_an_environment_left_half_made_is_made_again(fresh: Path) -> None:
    (fresh / ".venv/bin").mkdir(parents=True)
    (fresh / ".venv.lock").write_text("osqbox 4000000 changing")
    code, told, said = call(fresh, "serve")
    assert (code, told["words"]) == (0, ["serve"]), said
    assert "was left half-made: making it again" in said
    assert call(fresh, "serve")[2] == ""


def test_an_environment_whose_python_is_gone_is_made_again(checkout: Path) -> None:
    python = checkout / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    code, told, said = call(checkout, "serve")
    assert (code, told["words"]) == (0, ["serve"]), said
    assert "is broken: making it again" in said


def test_changes_are_marked_before_they_are_made(front_door: ModuleType, checkout: Path) -> None:
    """Only an installation that began to change things makes the next call start over."""
    environment = front_door.Environment(checkout, checkout / ".venv")
    environment.stamp.write_text("kept")
    lock = front_door.Lock(environment.lock)
    lock.mark("preparing")

    def fail_after(line: str) -> str:
        with pytest.raises(front_door.StepError) as caught:
            environment.run([sys.executable, "-c", f"print({line!r}); print('ERROR: no'); exit(1)"], lock)
        return str(caught.value)

    assert fail_after("Collecting trio") == "no"
    assert (environment.stamp.exists(), lock.read()[2]) == (True, "preparing")
    assert fail_after("Installing collected packages: trio") == "no"
    assert (environment.stamp.exists(), lock.read()[2]) == (False, "changing")
    lock.close()


def test_what_an_environment_cannot_outlive(front_door: ModuleType, checkout: Path) -> None:
    environment = front_door.Environment(checkout, checkout / ".venv")
    lock = front_door.Lock(environment.lock)
    assert environment.fault("", lock) == ""
    assert environment.fault(environment.home(), lock) == ""
    moved = f"{sys.implementation.cache_tag} /elsewhere/.venv /elsewhere"
    assert "another Python or place" in environment.fault(moved, lock)
    lock.close()


@pytest.fixture
def no_index() -> Any:
    """Settings of pip that lead to a port where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": f"http://127.0.0.1:{closed.getsockname()[1]}/", "PIP_RETRIES": "1"}


def need_a_library(checkout: Path) -> None:
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text().replace("requires = []", 'requires = ["hatchling>=1.27"]'))


def test_without_a_network_the_first_call_says_so(checkout: Path, no_index: dict[str, str]) -> None:
    need_a_library(checkout)
    code, told, said = call(checkout, "demo", **no_index)
    assert (code, told) == (3, None)
    first, reason, remedy, log = said.splitlines()
    assert "first run" in first
    assert reason == ("osqbox: no package index can be reached: No matching distribution found for hatchling>=1.27")
    assert remedy.endswith("osqbox.py' demo")
    assert log.endswith(str(checkout / ".venv/osqbox-install.log"))
    assert "hatchling" in (checkout / ".venv/osqbox-install.log").read_text()


def test_without_a_network_a_prepared_checkout_goes_on(checkout: Path, no_index: dict[str, str]) -> None:
    call(checkout, "serve")
    need_a_library(checkout)
    code, told, said = call(checkout, "serve", **no_index)
    assert (code, told["words"]) == (0, ["serve"])
    assert "no package index can be reached, going on with what is installed" in said
    assert call(checkout, "test", **no_index)[0] == 3, "what was never installed cannot be gone on with"


def test_a_folder_that_is_no_environment_is_left_alone(fresh: Path, tmp_path: Path) -> None:
    precious = tmp_path / "home/letter"
    precious.parent.mkdir()
    precious.write_text("dear")
    code, _, said = call(fresh, "serve", OSQBOX_VENV=str(precious.parent))
    assert (code, precious.read_text()) == (3, "dear")
    assert "is no virtual environment; set OSQBOX_VENV to another folder" in said


def test_a_lock_of_another_program_is_left_alone(fresh: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "uv.lock"
    foreign.write_text("version = 1\n")
    code, _, said = call(fresh, "serve", OSQBOX_VENV=str(tmp_path / "uv"))
    assert (code, foreign.read_text()) == (3, "version = 1\n")
    assert "belongs to another program" in said


def test_where_nothing_can_be_written_another_place_is_named(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, said = call(fresh, "serve", OSQBOX_VENV=str(tmp_path / "file/folder/venv"))
    assert code == 3
    assert "Not a directory" in said
    assert "  OSQBOX_VENV=~/.cache/osqbox-venv python" in said


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        (["apt-get", "uv", "virtualenv"], "bin/uv venv"),
        (["apt-get", "virtualenv"], "bin/virtualenv --python"),
        (["apt-get"], f"apt install python3.{sys.version_info.minor}-venv"),
        (["dnf"], "dnf install python3-virtualenv"),
        ([], "install virtualenv or uv"),
    ],
)
def test_a_python_without_ensurepip_is_helped(
    front_door: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, programs: list[str], expected: str
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in programs:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    try:
        answer = " ".join(front_door.venv_maker())
    except front_door.SetupError as error:
        answer = str(error)
        assert "\n" not in answer
    assert expected in answer


def test_an_old_python_is_told_which_one_to_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    for name, code in [("python3.13", 127), ("python3.12", 0)]:  # the first is a version manager's empty shim
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "hexversion", 0x03080000)
    monkeypatch.setattr(sys, "version", "3.8.18 (default)")
    monkeypatch.setattr(sys, "argv", ["osqbox.py", "demo"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = f"osqbox needs Python 3.11 or later, this is 3.8.18; try: python3.12 {SCRIPT} demo\n"
    assert (ended.value.code, capsys.readouterr().err) == (3, said)


def test_a_prepared_checkout_is_recognised_in_milliseconds(front_door: ModuleType, checkout: Path) -> None:
    environment = front_door.Environment(checkout, checkout / ".venv")
    environment.stamp.write_text(f"{environment.home()}\n{environment.project()}\ntest")
    took_s = []
    for _ in range(5):
        began = time.perf_counter()
        assert environment.is_ready({"test"})
        took_s.append(time.perf_counter() - began)
    assert min(took_s) < 0.01


def test_importing_osqbox_finds_the_package() -> None:
    where = [sys.executable, "-c", "import osqbox; print(osqbox.__file__)"]
    answer = subprocess.run(where, cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert Path(answer.stdout.strip()) == SCRIPT.parent / "osqbox/__init__.py"
