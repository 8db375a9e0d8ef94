"""The documentation's code blocks run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

PAGE_S = 50
ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("OSQBOX_", "PYTEST_"))}


def run_group(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status, None after PAGE_S, and all that was printed. Nothing that it started is left behind."""
    with (folder / "told").open("w+") as told:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=told, stderr=told,
        )  # fmt: skip
        status = None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(PAGE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told.seek(0)
        return status, told.read()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_blocks_are_passing_tests(page: Path, tmp_path: Path) -> None:
    """A page's Python blocks, together, are a test file that passes with nothing but osqbox installed."""
    code = "\n\n".join(blocks(page, "python"))
    assert "def test_" in code
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_page.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, env=CLEAN, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("page", pages_with("sh"), ids=lambda page: page.name)
def test_shell_blocks_run_in_a_fresh_box(page: Path, tmp_path: Path) -> None:
    """A page's shell blocks run in order inside `osqbox exec`, and stop at the first command that fails."""
    script = tmp_path / "page.sh"
    script.write_text("set -eu -o pipefail\n" + "\n".join(blocks(page, "sh")))
    box = (sys.executable, "-m", "osqbox", "exec", "--control", "--certs", str(tmp_path / "certs"))
    environment = {
        **CLEAN, "PATH": f"{Path(sys.executable).parent}:{CLEAN['PATH']}", "OSQBOX_HOME": str(tmp_path / "home")
    }  # fmt: skip
    status, told = run_group([*box, "--", "bash", str(script)], tmp_path, environment)
    assert status == 0, told


def test_the_downstream_example_passes_on_its_own(tmp_path: Path) -> None:
    """The example project uses nothing but the installed package and its fixtures."""
    project = tmp_path / "downstream"
    shutil.copytree(ROOT / "docs" / "examples" / "downstream", project, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        capture_output=True, text=True, cwd=project, env=CLEAN, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_every_link_to_a_file_leads_somewhere() -> None:
    """Relative links of README and docs point to files that exist."""
    missing = [
        f"{page.name}: {target}"
        for page in [*PAGES, ROOT / "SECURITY.md"]
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert missing == []
