"""A real OpenSearch on loopback: its jars by Maven, one small node in a Java process."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
VERSION = "2.19.1.0"
MAIN = "org.codelibs.opensearch.runner.OpenSearchRunner"
MAVEN_S = 240.0
START_S = 120.0
JAVA_MIN = 11
PORTS = range(9210, 9299)
"""The runner takes none above."""
BEHIND_THE_TESTS = ("nice", "-n", "10")
"""Other tests measure time on the same cores."""

SETTINGS = """\
cluster.routing.allocation.disk.threshold_enabled: false
action.destructive_requires_name: false
network.host: 127.0.0.1
http.port: {port}
transport.port: 0
node.processors: 1
"""

LOGGING = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %c{1.} %m%n
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
"""


class Missing(Exception):
    """Why there can be no real OpenSearch here."""


def jars() -> Path:
    """The folder with the jars; resolved on the first use, which may download 53 MB."""
    if (home := os.environ.get("OSQBOX_OPENSEARCH_JARS")) is not None:
        return Path(home)
    tools = HERE.parents[2] / ".ci" / "tools"
    base = tools if os.access(tools, os.W_OK) else Path(tempfile.gettempdir())
    place = base / f"opensearch-{VERSION}"
    with exclusive(Path(tempfile.gettempdir()) / f"osqbox-opensearch-{os.getuid()}.lock"):
        if not (place / "complete").exists():
            resolve(place)
    return place


def resolve(place: Path) -> None:
    if shutil.which("mvn") is None:
        raise Missing("Maven (mvn) is not installed; it brings OpenSearch for these tests")
    part = Path(tempfile.mkdtemp(prefix="osqbox-opensearch-"))
    try:
        command = ["mvn", "-q", "-B", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies"]
        command += [f"-DoutputDirectory={part}", "-DincludeScope=runtime"]
        done = subprocess.run([*command, "-o"], capture_output=True, text=True, timeout=MAVEN_S, check=False)
        if done.returncode:
            done = subprocess.run(command, capture_output=True, text=True, timeout=MAVEN_S, check=False)
        if done.returncode:
            raise Missing(f"Maven could not bring OpenSearch: {done.stdout.strip()[-300:]}")
        shutil.copytree(part, place, dirs_exist_ok=True)
        (place / "complete").touch()
    except subprocess.TimeoutExpired:
        raise Missing(f"Maven could not bring OpenSearch within {MAVEN_S:.0f} s") from None
    finally:
        shutil.rmtree(part)


def java() -> str:
    program = shutil.which("java")
    if program is None:
        raise Missing("Java is not installed; OpenSearch runs on it")
    told = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
    version = re.search(r'version "(\d+)', told)
    if version is None or int(version[1]) < JAVA_MIN:
        raise Missing(f"Java {JAVA_MIN} or newer is needed, got {told.splitlines()[0] if told else 'none'}")
    return program


def command_line(home: Path, port: int) -> list[str]:
    config = home / "node_1" / "config"
    if not config.exists():
        config.mkdir(parents=True)
        (config / "opensearch.yml").write_text(SETTINGS.format(port=port))
        (config / "log4j2.properties").write_text(LOGGING)
    return [
        *BEHIND_THE_TESTS,
        java(),
        *(
            "-Xms192m",
            "-Xmx384m",
            "-XX:ActiveProcessorCount=1",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-Xshare:auto",
        ),
        *("-Dopensearch.networkaddress.cache.ttl=60", "-Djava.awt.headless=true"),
        *("-cp", f"{jars()}/*", MAIN),
        *("-basePath", str(home), "-numOfNode", "1", "-clusterName", f"osqbox-{port}"),
        *("-baseHttpPort", str(port - 1)),
    ]


def free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise Missing(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")


def wait_ready(url: str, is_alive: object, output: Path) -> None:
    limit = time.monotonic() + START_S
    while time.monotonic() < limit:
        if callable(is_alive) and not is_alive():
            break
        try:
            with urllib.request.urlopen(
                f"{url}/_cluster/health?wait_for_status=yellow&timeout=1s", timeout=5
            ) as answer:
                if json.load(answer)["status"] in ("green", "yellow"):
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    told = output.read_text(errors="replace")[-2000:] if output.exists() else ""
    raise RuntimeError(f"OpenSearch did not start within {START_S:.0f} s: {told}")


@contextmanager
def exclusive(path: Path) -> Iterator[IO[bytes]]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


# shared by all test processes of a run


@contextmanager
def shared(place: Path) -> Iterator[str]:
    """The URL of the run's OpenSearch, started by whoever comes first and ended after the last."""
    users = place / "opensearch.users"
    with exclusive(place / "opensearch.lock"):
        told = place / "opensearch.json"
        lock = users.open("ab")
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not told.exists():
            try:
                told.write_text(json.dumps(start_supervised(users)))
            except BaseException:
                lock.close()
                raise
        url = json.loads(told.read_text())["url"]
    try:
        yield url
    finally:
        lock.close()


def start_supervised(users: Path) -> dict[str, str]:
    home, port = Path(tempfile.mkdtemp(prefix="osqbox-opensearch-")), free_port()
    line = command_line(home, port)
    supervisor = subprocess.Popen(
        [sys.executable, str(HERE / "_supervise.py"), str(users), str(home), *line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    wait_ready(url, lambda: supervisor.poll() is None, home / "output.txt")
    supervisor.returncode = 0  # it outlives this process; nobody waits for it here
    return {"url": url, "home": str(home)}


# one of one's own, to be mistreated


@dataclass
class Real:
    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """On the data that is there."""
        output = self.home / "output.txt"
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                command_line(self.home, self.port), cwd=self.home, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        wait_ready(self.url, lambda: self.process is not None and self.process.poll() is None, output)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)


@contextmanager
def own() -> Iterator[Real]:
    home = Path(tempfile.mkdtemp(prefix="osqbox-opensearch-"))
    real = Real(home, free_port())
    try:
        real.start()
        yield real
    finally:
        real.kill()
        shutil.rmtree(home, ignore_errors=True)
