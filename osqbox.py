#!/usr/bin/env python3
"""The front door of a checkout: ``python3 osqbox.py demo``, or any other verb of osqbox.

On a fresh machine it makes ``.venv`` beside this file, installs the checkout into it and carries on inside;
afterwards it starts at once and needs no network. ``python3 osqbox.py test`` does the same and runs the test
suite: pytest, with the words that follow. It needs nothing but Python 3.11 or later.

    OSQBOX_VENV      another folder for the environment, for a checkout that cannot be written to
    OSQBOX_WAITED    is 1 for the program when another call had to finish the installation first

The program itself is the package ``osqbox/``. Nobody imports this file: ``import osqbox`` finds the package.
"""

import os
import sys
from collections import deque
from pathlib import Path


def explain_old_python() -> str:
    """One line for whoever came with an older Python: this runs, and the whole file parses, on 3.6."""
    import shutil
    import subprocess

    advice = "install one from https://www.python.org/downloads/"
    for name in [f"python3.{minor}" for minor in range(15, 10, -1)]:
        program = shutil.which(name)
        if program and subprocess.call([program, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            advice = "try: " + " ".join([name, *sys.argv])
            break
    return f"osqbox needs Python 3.11 or later, this is {sys.version.split()[0]}; {advice}"


if sys.hexversion < 0x030B0000:
    print(explain_old_python(), file=sys.stderr)
    sys.exit(3)

EXIT_BAD_SETUP = 3
EXIT_INTERRUPTED = 130
KEPT_LINES = 1000
TEST_PROCESSES_MAX = 4
CHANGES_BEGIN = ("Installing collected packages", "Resolved ")
"""How pip's and uv's output says that from now on the environment is neither old nor new."""


class SetupError(Exception):
    """What stands in the way, and the command that mends it."""


class StepError(Exception):
    """A program ended with an error: its last error line."""

    def __init__(self, lines: list[str]) -> None:
        errors = [line for line in lines if line.lower().startswith("error:")]
        loudest = [line for line in errors if line.startswith("ERROR:")]
        super().__init__((loudest or errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR: "))
        self.offline = any("connection broken by" in line or "Failed to fetch" in line for line in lines)


class Lock:
    """Held by one call at a time, and by the programs it starts, which may outlive it.

    The file says who holds it and what is being done, so ``changing`` found in a free lock means: cut short.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.waited = False
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.waited = True
            say(f"another call (process {self.read()[1]}) is preparing the environment, waiting for it")
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        owner, _, self.left = self.read()
        if owner != "osqbox":
            raise SetupError(f"{path} belongs to another program; set OSQBOX_VENV to another folder")

    def close(self) -> None:
        os.close(self.descriptor)

    def read(self) -> list[str]:
        words = os.pread(self.descriptor, 64, 0).decode(errors="replace").split()
        return [*words, "", ""][:3] if words else ["osqbox", "unknown", ""]

    def mark(self, doing: str) -> None:
        """In one write of one length, so that a reader sees the old words or the new ones."""
        os.pwrite(self.descriptor, f"osqbox {os.getpid()} {doing}".ljust(40).encode(), 0)


class Environment:
    """The virtual environment a checkout runs in. A stamp inside, written last, says what was installed."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.checkout = checkout
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.stamp = folder / "osqbox-stamp"
        self.log = folder / "osqbox-install.log"
        self.lock = folder.with_name(folder.name + ".lock")

    def is_ready(self, extras: set[str]) -> bool:
        home, project, installed = self.read_stamp()
        return (
            home == self.home()
            and project == self.project()
            and extras <= installed
            and os.access(self.python, os.X_OK)
        )

    def prepare(self, extras: set[str]) -> bool:
        """Make, mend or update it, unless another call just did. True if another call was waited for."""
        import contextlib

        try:
            self.lock.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(Lock(self.lock)) as lock:
                if not self.is_ready(extras):
                    self.install(extras, lock)
                return lock.waited
        except OSError as error:
            raise SetupError(
                f"{error.filename or self.folder}: {error.strerror}; the environment can be kept elsewhere:\n"
                f"  OSQBOX_VENV=~/.cache/osqbox-venv {as_typed()}"
            ) from error

    def home(self) -> str:
        """What an environment cannot outlive: its Python and its place."""
        return f"{sys.implementation.cache_tag} {self.folder} {self.checkout}"

    def project(self) -> str:
        import hashlib

        return hashlib.sha256((self.checkout / "pyproject.toml").read_bytes()).hexdigest()

    def read_stamp(self) -> tuple[str, str, set[str]]:
        try:
            home, project, extras = self.stamp.read_text().split("\n")
        except (OSError, ValueError):
            return "", "", set()
        return home, project, set(filter(None, extras.split(",")))

    def install(self, extras: set[str], lock: Lock) -> None:
        import time

        began = time.monotonic()
        home, project, installed = self.read_stamp()
        wanted = ",".join(sorted(extras | installed))
        fault = self.fault(home, lock)
        if fault:
            say(f"{self.folder} {fault}: making it again")
            self.clear(lock)
        elif not home:
            say(f"first run: installing osqbox and its libraries in {self.folder} (about half a minute)")
        elif project != self.project():
            say(f"pyproject.toml has changed: updating {self.folder}")
        else:
            say(f"adding the libraries of the test suite to {self.folder}")

        if not self.python.exists():
            self.make(lock)
        try:
            lock.mark("preparing")
            self.run([*installer(self.python), "--editable", f".[{wanted}]" if wanted else "."], lock)
        except StepError as failed:
            # The stamp is there as long as the installer changed nothing.
            if not (failed.offline and self.stamp.exists() and extras <= installed):
                raise SetupError(self.explain(failed)) from failed
            say(f"no package index can be reached, going on with what is installed ({failed})")
            return
        self.stamp.write_text(f"{self.home()}\n{self.project()}\n{wanted}")
        lock.mark("done")
        say(f"ready after {time.monotonic() - began:.0f} s")

    def fault(self, home: str, lock: Lock) -> str:
        """Why it must be made again; empty when it can be used, or is not there yet."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return ""
        if lock.left == "changing":
            return "was left half-made"
        if not (self.folder / "pyvenv.cfg").exists():
            raise SetupError(f"{self.folder} is no virtual environment; set OSQBOX_VENV to another folder")
        if home and home != self.home():
            return "was made for another Python or place (OSQBOX_VENV=FOLDER keeps one for each)"
        return "" if self.python_answers() else "is broken"

    def python_answers(self) -> bool:
        import subprocess

        ask = [str(self.python), "-c", "import sys; print(sys.implementation.cache_tag)"]
        try:
            answer = subprocess.run(ask, capture_output=True, text=True, check=False)
        except OSError:
            return False
        return answer.stdout == f"{sys.implementation.cache_tag}\n"

    def clear(self, lock: Lock) -> None:
        import shutil

        lock.mark("changing")
        shutil.rmtree(self.folder)

    def make(self, lock: Lock) -> None:
        lock.mark("changing")
        self.folder.mkdir(exist_ok=True)
        try:
            self.run([*venv_maker(), str(self.folder)], lock)
        except StepError as failed:
            raise SetupError(self.explain(failed)) from failed

    def run(self, command: list[str], lock: Lock) -> None:
        """One step: its output goes to the log, its latest line to a terminal. Raises StepError."""
        import subprocess

        lines: deque[str] = deque(maxlen=KEPT_LINES)
        process = subprocess.Popen(
            command,
            cwd=self.checkout,
            env={**os.environ, "PIP_USER": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[lock.descriptor],
        )
        with process, self.log.open("w") as log:
            try:
                for line in process.stdout or ():
                    log.write(line)
                    lines.append(line.strip())
                    if line.startswith(CHANGES_BEGIN):
                        self.stamp.unlink(missing_ok=True)
                        lock.mark("changing")
                    show_progress(line.strip())
            except BaseException:
                process.terminate()
                raise
            finally:
                show_progress("")
        if process.returncode:
            raise StepError([line for line in lines if line])

    def explain(self, failed: StepError) -> str:
        reason = "no package index can be reached" if failed.offline else "the installation failed"
        remedy = "connect, or set PIP_INDEX_URL to a mirror, then" if failed.offline else "once mended,"
        return f"{reason}: {failed}\n  {remedy} call again: {as_typed()}\n  the whole output: {self.log}"


def venv_maker() -> list[str]:
    """The command that makes an environment in the folder named next."""
    import importlib.util
    import shutil

    # Not the environment this may itself be running in, since that one may be about to be made again.
    python: str = getattr(sys, "_base_executable", None) or sys.executable
    if importlib.util.find_spec("ensurepip"):
        return [python, "-m", "venv"]
    uv, virtualenv = shutil.which("uv"), shutil.which("virtualenv")
    if uv:
        return [uv, "venv", "--allow-existing", "--python", python]
    if virtualenv:
        return [virtualenv, "--python", python]
    sudo = "sudo " if os.geteuid() and shutil.which("sudo") else ""
    for manager, remedy in [
        ("apt-get", f"apt install python3.{sys.version_info.minor}-venv"),
        ("dnf", "dnf install python3-virtualenv"),
        ("zypper", "zypper install python3-virtualenv"),
        ("apk", "apk add py3-virtualenv"),
    ]:
        if shutil.which(manager):
            raise SetupError(f"this Python cannot make virtual environments; type: {sudo}{remedy}")
    raise SetupError("this Python cannot make virtual environments; install virtualenv or uv, then call again")


def installer(python: Path) -> list[str]:
    """The command that installs what is named next into the environment of this Python."""
    import shutil
    import subprocess

    if subprocess.call([python, "-c", "import pip"], stderr=subprocess.DEVNULL) == 0:
        options = ["--disable-pip-version-check", "--no-input", "--prefer-binary", "--progress-bar=off"]
        return [str(python), "-m", "pip", "install", *options]
    uv = shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--python", str(python)]
    raise SetupError(f"{python.parent.parent} has no pip; remove that folder and call again: {as_typed()}")


def show_progress(line: str) -> None:
    """On a terminal, one line that the next one replaces."""
    if sys.stderr.isatty():
        import shutil

        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(f"osqbox: {text}", file=sys.stderr, flush=True)


def as_typed() -> str:
    import shlex

    return shlex.join([Path(sys.executable).name, *sys.argv])


def test_words(words: list[str]) -> list[str]:
    """The whole suite runs on several cores; a part of it, or a choice already made, runs as asked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    whole = all(word.startswith("-") for word in words)
    chosen = any(word.startswith(("-n", "--numprocesses", "--dist", "--pdb")) for word in words)
    return [f"-n{min(cores, TEST_PROCESSES_MAX)}", *words] if whole and not chosen and cores > 1 else words


def prepare(words: list[str]) -> list[str]:
    """The command that runs these words, in an environment that is ready for it. Raises SetupError."""
    if os.name == "nt":
        raise SetupError("osqbox runs on Linux and macOS; on Windows use it inside WSL")
    checkout = Path(__file__).resolve().parent
    folder = Path(os.environ.get("OSQBOX_VENV") or checkout / ".venv").expanduser().resolve()
    environment = Environment(checkout, folder)
    testing = words[:1] == ["test"]
    extras = {"test"} if testing else set()
    if not environment.is_ready(extras) and environment.prepare(extras):
        os.environ["OSQBOX_WAITED"] = "1"
    if testing:
        os.chdir(checkout)
        return [str(environment.python), "-m", "pytest", *test_words(words[1:])]
    # -P: a module in the working directory does not stand in for one of ours.
    return [str(environment.python), "-P", "-m", "osqbox", *words]


def main() -> None:
    try:
        command = prepare(sys.argv[1:])
    except SetupError as reason:
        say(str(reason))
        sys.exit(EXIT_BAD_SETUP)
    except KeyboardInterrupt:
        say("interrupted; the next call takes it up again")
        sys.exit(EXIT_INTERRUPTED)
    os.environ["OSQBOX_CALLED_AS"] = "python3 " + sys.argv[0]
    os.execv(command[0], command)  # noqa: S606  # the words of this call, with no shell in between


if __name__ == "__main__":
    main()
