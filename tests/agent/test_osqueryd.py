"""The osqueryd program as managers run it: a process of its own, against a real box where it talks to a server."""

from __future__ import annotations

import functools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from osqbox.testing import Osqbox

T = TypeVar("T")

WAIT_S = 20.0
PROGRAM = [sys.executable, "-m", "osqbox", "osqueryd"]


def run(*words: str, stdin: str = "", environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **(environ or {})}
    return subprocess.run([*PROGRAM, *words], input=stdin, capture_output=True, text=True, timeout=30, env=env)


def until(what: Callable[[], T], message: str = "") -> T:
    """The first true value of ``what``; for files and sockets of another process."""
    deadline = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline, message or f"not in {WAIT_S} s"
        time.sleep(0.02)
    return found


class Daemon:
    """A running daemon whose standard error can be waited for."""

    def __init__(self, *words: str, environ: dict[str, str] | None = None) -> None:
        env = {**os.environ, **(environ or {})}
        self.process = subprocess.Popen(
            [*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        self.lines: list[str] = []
        self.printed: list[str] = []
        self._readers = [
            threading.Thread(target=self._follow, args=each, daemon=True)
            for each in ((self.process.stderr, self.lines), (self.process.stdout, self.printed))
        ]
        for reader in self._readers:
            reader.start()

    def _follow(self, pipe: Any, lines: list[str]) -> None:
        lines.extend(iter(pipe.readline, ""))  # each as it comes

    def says(self, words: str) -> str:
        """The first such line; fails at once when the process ends without one."""

        def look() -> str:
            over = self.process.poll() is not None
            for reader in self._readers if over else ():
                reader.join(WAIT_S)
            found = next((line for line in self.lines if words in line), "")
            assert found or not over, f"{words!r} in {self.lines}"
            return found

        return until(look, words)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        code = self.process.wait(WAIT_S)
        for reader in self._readers:
            reader.join(WAIT_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code


Start = Callable[..., Daemon]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for the socket's sake."""
    with tempfile.TemporaryDirectory(prefix="oq") as path:
        yield Path(path)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts daemons that keep everything in ``folder``."""
    started: list[Daemon] = []

    def begin(*words: str, **environ: str) -> Daemon:
        own = [f"--pidfile={folder}/pid", f"--database_path={folder}/db", f"--extensions_socket={folder}/em"]
        started.append(Daemon(*own, f"--logger_path={folder}", "--verbose", *words, environ=environ))
        return started[-1]

    yield begin
    for daemon in started:
        if daemon.process.returncode is None:
            daemon.stop()


def write_config(folder: Path, config: dict[str, Any], name: str = "osquery.conf") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# a comment\n" + json.dumps(config))
    return path


def _has_lines(path: Path, count: int) -> bool:
    return len(json_lines(path)) >= count


def json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


# -- the shell -------------------------------------------------------------------------------------------------------


def test_one_query_in_json() -> None:
    sql = "select p.pid, u.username from processes p join users u using (uid) where p.pid = 1 limit 2"
    done = run("-S", "--json", sql)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == '[\n  {"pid":"1","username":"root"}\n]\n'


def test_an_error_goes_to_stderr_and_its_code_is_the_exit_code() -> None:
    done = run("-S", "--json", "select * from nope")
    assert (done.returncode, done.stdout, done.stderr) == (1, "[\n\n]\n", "Error: no such table: nope\n")
    done = run("-S", "--csv", "select * from file")
    assert done.returncode == 19
    assert "required column" in done.stderr
    assert done.stderr.endswith("Error: constraint failed\n")


def test_statements_from_standard_input_run_one_by_one_and_1_means_that_one_failed() -> None:
    script = "select 1\n as a;\nselect broken;\nselect 2 as b, 'x y' as c;\n.mode line\nselect 3 as d"
    done = run("-S", "--csv", stdin=script)
    assert done.stdout == 'a\n1\nb,c\n2,"x y"\n    d = 3\n'
    assert done.stderr == "Error: near line 3: no such column: broken\n"
    assert done.returncode == 1


def test_launchers_way_of_asking() -> None:
    """Its SQL comes by standard input, with flags that forbid all state."""
    words = "-S --config_path /dev/null --disable_events --disable_database --ephemeral --json --disable_audit"
    done = run(*words.split(), stdin="select version from osquery_info;\n")
    assert (done.returncode, json.loads(done.stdout)) == (0, [{"version": "5.23.1"}])


def test_orbits_way_of_asking_keeps_the_instance_in_the_database(folder: Path) -> None:
    sql = "SELECT\n  os.version, os.platform, hardware_serial, uuid, instance_id\nFROM system_info, os_version os, \
(select instance_id from osquery_info)"
    words = ["-S", "--database_path", f"{folder}/db", "--json", sql]
    first, again = json.loads(run(*words).stdout), json.loads(run(*words).stdout)
    assert first == again
    assert len(first) == 1
    assert first[0]["instance_id"]


def test_words_pass_through_the_command_line_untouched() -> None:
    """Our own parser of options takes none of them: neither what it knows, nor a double dash."""
    done = run("-S", "--json", "--noheader", "--", "select '--help' as word")
    assert (done.returncode, done.stdout) == (0, '[\n  {"word":"--help"}\n]\n')


def test_files_in_and_out(folder: Path) -> None:
    (folder / "q.sql").write_text("select 5 as five")
    done = run("-S", "--list", f"--query_file={folder}/q.sql", f"--output={folder}/out")
    assert (done.returncode, done.stdout, (folder / "out").read_text()) == (0, "", "five\n5\n")
    gone = run("-S", f"--query_file={folder}/gone")
    assert (gone.returncode, "No such file" in gone.stderr) == (1, True)


def test_tables_schemas_and_other_meta_commands() -> None:
    assert "  => processes\n" in run("-S", "-L").stdout
    assert "total_seconds = " in run("-S", "--line", "-A", "uptime").stdout
    done = run("-S", stdin=".schema uptime\n.tables time\n.bogus\n.mode nope\n.print a b\n.exit\nselect 1;\n")
    assert done.stdout.startswith("CREATE TABLE uptime(`days` INTEGER")
    assert done.stdout.endswith("  => time\na b\n")
    assert 'unknown command or invalid arguments:  "bogus"' in done.stderr
    assert "mode should be one of" in done.stderr
    assert done.returncode == 1


def test_queries_of_a_pack(folder: Path) -> None:
    (folder / "p.json").write_text('{"queries": {"q": {"query": "select 7 as seven", "interval": 60}}}')
    config = write_config(folder, {"packs": {"mine": str(folder / "p.json")}})
    done = run("-S", "--csv", "--pack=mine", f"--config_path={config}")
    assert (done.returncode, done.stdout) == (0, "seven\n7\n")


def test_a_pretended_host_is_the_same_each_time() -> None:
    environ = {"OSQBOX_PROFILE": "debian", "OSQBOX_SEED": "7", "OSQBOX_START_TIME": "2026-01-31T08:00:00Z"}
    sql = "select hostname, uuid, platform from system_info, os_version"
    first = run("-S", "--json", sql, environ=environ)
    flags = ["--osqbox_profile=debian", "--osqbox_seed=7", "--osqbox_start_time=2026-01-31T08:00:00Z"]
    again = run("-S", "--json", *flags, sql)
    other = run("-S", "--json", *flags, "--osqbox_index=1", sql)
    assert first.stdout == again.stdout != other.stdout
    assert json.loads(first.stdout)[0]["platform"] == "debian"


def test_a_person_at_a_terminal_gets_a_prompt() -> None:
    mine, theirs = pty.openpty()
    with subprocess.Popen([*PROGRAM, "-S"], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        seen = _until_seen(mine, b"osquery> ")
        assert b"Need help" in seen
        os.write(mine, b"select 40 + 2 as answer;\n")
        assert b"| 42     |" in _until_seen(mine, b"osquery> ", skip=b"42")
        os.write(mine, b".quit\n")
        assert process.wait(WAIT_S) == 0
        os.close(mine)


def _until_seen(terminal: int, wanted: bytes, skip: bytes = b"") -> bytes:
    """What the terminal shows until ``wanted`` comes, after ``skip``."""
    seen = b""
    deadline = time.monotonic() + WAIT_S
    while wanted not in seen.partition(skip)[2] if skip else wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536)
    return seen


# -- small answers ---------------------------------------------------------------------------------------------------


def test_version_help_and_unknown_flags() -> None:
    assert run("--version").stdout == "osqueryd version 5.23.1\n"
    for word in ("--help", "-h"):
        done = run(word)
        assert (done.returncode, "--database_path" in done.stdout) == (0, True)
    done = run("--bogus", "--verbose")
    assert (done.returncode, done.stderr) == (1, "ERROR: unknown command line flag 'bogus'\n")


def test_config_check_is_silent_about_a_good_config(folder: Path) -> None:
    good, bad = write_config(folder, {"schedule": {}}), folder / "bad.conf"
    bad.write_text("{")
    done = run("--config_check", f"--config_path={good}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for path in (bad, folder / "gone.conf"):
        done = run("--config_check", f"--config_path={path}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error reading config: ")
        assert str(path) in done.stderr


def test_config_check_asks_the_server(folder: Path, osqbox: Osqbox) -> None:
    osqbox.config({"schedule": {}})
    words = ["--config_check", "--flagfile", str(osqbox.flagfile), f"--database_path={folder}/db"]
    words.append("--host_identifier=ephemeral")
    assert run(*words).returncode == 0
    done = run(*words, "--tls_hostname=localhost:1", "--config_tls_max_attempts=1")
    assert (done.returncode, "Error reading config: " in done.stderr) == (1, True)


def test_config_dump_shows_each_source_as_it_is(folder: Path) -> None:
    path = folder / "o.conf"
    path.write_text('{"a": 1}')
    (folder / "o.conf.d").mkdir()
    (folder / "o.conf.d" / "x.conf").write_text('{"b": 2}')
    done = run("--config_dump", f"--config_path={path}")
    assert (done.returncode, done.stdout) == (0, f'{{"{path}": {{"a": 1}}}}\n{{"{path}.d/x.conf": {{"b": 2}}}}\n')


# -- the daemon: files, locks, signals -------------------------------------------------------------------------------

EVERY_SECOND = {
    "options": {"schedule_splay_percent": 0},
    "schedule": {
        "one": {"query": "select 1 as a", "interval": 1},
        "snap": {"query": "select 2 as b", "interval": 1, "snapshot": True},
    },
}


def test_the_filesystem_plugins_read_a_config_and_write_logs(folder: Path, start: Start) -> None:
    config = write_config(folder, EVERY_SECOND)
    pack = {"queries": {"q": {"query": "select 3 as c", "interval": 1}}}
    (folder / "pack.conf").write_text(json.dumps(pack))
    write_config(folder, {"packs": {"p": str(folder / "pack.conf")}}, "osquery.conf.d/more.conf")
    daemon = start(f"--config_path={config}", "--disable_extensions")
    until(functools.partial(_has_lines, folder / "osqueryd.results.log", 2))
    results = json_lines(folder / "osqueryd.results.log")
    until(lambda: json_lines(folder / "osqueryd.snapshots.log"))
    assert daemon.stop() == 0
    assert {line["name"]: line["columns"] for line in results} == {"one": {"a": "1"}, "pack_p_q": {"c": "3"}}
    snapshot = json_lines(folder / "osqueryd.snapshots.log")[0]
    assert (snapshot["name"], snapshot["snapshot"], snapshot["action"]) == ("snap", [{"b": "2"}], "snapshot")
    assert (folder / "osqueryd.results.log").stat().st_mode & 0o777 == 0o640
    status = (folder / "osqueryd.INFO").resolve()
    assert status.name.startswith("osqueryd.INFO.2")
    assert "Storing initial results for new scheduled query: one" in status.read_text()


def test_a_restart_goes_on_where_the_last_run_stopped(folder: Path, start: Start) -> None:
    """The differential of a query that has not changed stays silent in the second run."""
    config = write_config(folder, EVERY_SECOND)
    log, snapshots = folder / "osqueryd.results.log", folder / "osqueryd.snapshots.log"
    for _ in range(2):
        seen = len(json_lines(snapshots))
        daemon = start(f"--config_path={config}", "--disable_extensions")
        until(functools.partial(_has_lines, snapshots, seen + 2))
        assert daemon.stop() == 0
    assert [line["name"] for line in json_lines(log)] == ["one"]
    dumped = run("--database_dump", f"--database_path={folder}/db")
    assert 'queries[one]: [{"a":1}]\n' in dumped.stdout


def test_the_stdout_logger_prints_lines(folder: Path, start: Start) -> None:
    config = write_config(folder, EVERY_SECOND)
    daemon = start(f"--config_path={config}", "--logger_plugin=stdout", "--disable_extensions")
    until(lambda: any('"name":"one"' in line for line in daemon.printed))
    until(lambda: any(line.startswith("severity=0 location=query.cpp:0 message=") for line in daemon.printed))
    assert daemon.stop(signal.SIGINT) == 0


def test_the_pidfile_is_locked_while_it_runs_and_gone_afterwards(folder: Path, start: Start) -> None:
    pidfile = folder / "pid"
    daemon = start("--disable_extensions", "--config_path=/dev/null")
    daemon.says("osquery initialized [version=5.23.1]")
    assert pidfile.read_text() == str(daemon.process.pid)
    assert pidfile.stat().st_mode & 0o777 == 0o600
    second = start("--disable_extensions", "--config_path=/dev/null")
    second.says(f"osqueryd Pidfile check failed: osqueryd ({daemon.process.pid}) is already running")
    assert second.ended() == 1
    third = start("--force", "--disable_extensions", "--config_path=/dev/null")
    third.says("osquery initialized")
    assert daemon.ended() == -signal.SIGKILL
    assert pidfile.read_text() == str(third.process.pid)
    assert third.stop(signal.SIGUSR1) == 0
    assert not pidfile.exists()


def test_one_database_one_process_unless_ephemeral(folder: Path, start: Start) -> None:
    quiet = ("--disable_extensions", "--config_path=/dev/null", "--logger_plugin=stdout")
    first = start(*quiet)
    until((folder / "db" / "agent.db").exists)
    first.says("config")
    second = start(f"--pidfile={folder}/pid2", *quiet)
    second.says("osqueryd initialize failed: Could not initialize database")
    assert second.ended() == 1
    third = start("--ephemeral", "--disable_database", *quiet)
    third.says("config")
    assert third.stop() == 0
    assert first.stop() == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--logger_plugin=nosuch"], "Cannot activate nosuch logger plugin"),
        (["--config_plugin=nosuch", "--disable_extensions"], "Cannot activate nosuch config plugin"),
        (["--logger_path=/nowhere/at/all"], "Cannot activate filesystem logger plugin"),
        (["--extensions_require=absent"], "Required extension not found or not loaded: absent"),
        (["--extensions_socket=/nowhere/em", "--extensions_require=absent"], "Cannot start extension manager"),
    ],
)
def test_a_plugin_that_cannot_be_activated_ends_it_with_78(words: list[str], reason: str, start: Start) -> None:
    daemon = start("--config_path=/dev/null", "--extensions_timeout=0", *words)
    daemon.says(reason)
    assert daemon.ended() == 78


# -- extensions ------------------------------------------------------------------------------------------------------

EXTENSION = """
import json, osquery

@osquery.register_plugin
class Coffee(osquery.TablePlugin):
    def name(self):
        return "coffee"
    def columns(self):
        return [osquery.TableColumn(name="pid", type=osquery.STRING),
                osquery.TableColumn(name="cups", type=osquery.INTEGER)]
    def generate(self, context):
        return [{"pid": "1", "cups": 3}]

@osquery.register_plugin
class Config(osquery.ConfigPlugin):
    def name(self):
        return "mine"
    def content(self):
        return [{"src": json.dumps({"schedule": {"c": {
            "query": "select cups from coffee join processes using (pid)", "interval": 1, "snapshot": True}}})}]

@osquery.register_plugin
class Logger(osquery.LoggerPlugin):
    def name(self):
        return "mine"
    def log_string(self, value):
        open(__file__ + ".got", "a").write(value + "\\n")
        return osquery.extensions.ttypes.ExtensionStatus(code=0, message="OK")
    log_snapshot = log_string

osquery.start_extension(name="mine", version="1")
"""


def write_extension(folder: Path) -> str:
    """The flag that loads it."""
    (folder / "mine.py").write_text(EXTENSION)
    program = folder / "mine.ext"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore {folder}/mine.py "$@"\n')
    program.chmod(0o755)
    (folder / "load").write_text(f"# a comment\n{program}\n")
    return f"--extensions_autoload={folder}/load"


def test_an_extension_in_python_is_loaded_and_its_plugins_are_used(folder: Path, start: Start) -> None:
    """The public package, unmodified, started by autoload: a table joined with ours, a config, a logger."""
    pytest.importorskip("osquery")
    daemon = start(
        "--config_plugin=mine", "--logger_plugin=mine,filesystem", "--disable_extensions=false",
        "--extensions_timeout=20", "--extensions_require=mine", write_extension(folder),
    )  # fmt: skip
    got = until(lambda: json_lines(folder / "mine.py.got"))
    assert got[0]["snapshot"] == [{"cups": "3"}]
    written = until(lambda: json_lines(folder / "osqueryd.snapshots.log"))  # the loggers are called one after another
    assert written[0]["snapshot"] == [{"cups": "3"}]
    shell = run("-S", f"--connect={folder}/em", "--json", "select name, type from osquery_extensions order by uuid")
    assert json.loads(shell.stdout) == [{"name": "core", "type": "core"}, {"name": "mine", "type": "extension"}]
    assert run("-S", f"--connect={folder}/em", "select nope").stderr == "Error: no such column: nope\n"
    assert daemon.stop() == 0
    assert not (folder / "em").exists()


def test_a_live_campaign_joins_an_extensions_table_with_processes(folder: Path, start: Start, osqbox: Osqbox) -> None:
    pytest.importorskip("osquery")
    words = [f"--flagfile={osqbox.flagfile}", f"--pidfile={folder}/pid", f"--database_path={folder}/db"]
    start(*words, f"--extensions_socket={folder}/em", "--extensions_require=mine", "--extensions_timeout=20",
          write_extension(folder))  # fmt: skip
    osqbox.wait_for("enroll", timeout=WAIT_S)
    assert osqbox.query("select pid, cups from processes join coffee using (pid)") == [{"pid": "1", "cups": "3"}]


def test_a_shell_waits_for_the_extension_it_requires(folder: Path) -> None:
    pytest.importorskip("osquery")
    own = [f"--extensions_socket={folder}/em", "--extensions_timeout=20", "--extensions_require=mine"]
    done = run(
        "-S",
        *own,
        write_extension(folder),
        "--csv",
        "select cups, name = '' as anonymous from coffee join \
processes using (pid)",
    )
    assert (done.returncode, done.stdout) == (0, "cups,anonymous\n3,0\n"), done.stderr
    assert not (folder / "em").exists()
    absent = run(
        "-S", f"--extensions_socket={folder}/em", "--extensions_timeout=0", "--extensions_require=x", "select 1"
    )
    assert (absent.returncode, "Required extension not found or not loaded: x" in absent.stderr) == (78, True)


SPAWN = """
import sys, osquery
instance = osquery.SpawnInstance(path=sys.argv[1])
instance.open(timeout=15)
found = instance.client.query("select pid from processes where pid = 1")
assert (found.status.code, found.response) == (0, [{"pid": "1"}]), found
assert instance.client.options()["disable_database"].value == "true"
print("fine")
"""


def test_the_python_package_starts_it_as_its_osqueryd(folder: Path) -> None:
    """SpawnInstance takes a path and no words: `--osqbox_install` writes a program for it."""
    pytest.importorskip("osquery")
    assert run(f"--osqbox_install={folder}/osqueryd").returncode == 0
    words = [sys.executable, "-c", SPAWN, f"{folder}/osqueryd"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_a_stop_does_not_wait_for_a_runaway_query(folder: Path, start: Start) -> None:
    runaway = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
    config = write_config(folder, {**EVERY_SECOND, "schedule": {"spin": {"query": runaway, "interval": 1}}})
    daemon = start(f"--config_path={config}", "--disable_watchdog", "--disable_extensions")
    daemon.says("Executing scheduled query spin")
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 5


# -- against a box ---------------------------------------------------------------------------------------------------


def test_the_flag_file_of_a_box_makes_it_a_node_that_answers(folder: Path, start: Start, osqbox: Osqbox) -> None:
    """Enrolls, runs the box's schedule, answers live queries and carves; a restart keeps the enrollment."""
    osqbox.config({"schedule": {"one": {"query": "select 1 as a", "interval": 1}}})
    words = [f"--flagfile={osqbox.flagfile}", f"--pidfile={folder}/pid", f"--database_path={folder}/db"]
    words += [f"--extensions_socket={folder}/em", "--logger_plugin=tls,filesystem", "--host_identifier=instance"]
    daemon = start(*words)
    osqbox.wait_for("enroll", timeout=WAIT_S)
    rows = osqbox.query("select version, (select count(*) from users where uid = 0) as roots from osquery_info")
    assert rows == [{"version": "5.23.1", "roots": "1"}]
    osqbox.wait_for("log", timeout=WAIT_S)
    until(lambda: json_lines(folder / "osqueryd.results.log"))
    assert daemon.stop() == 0
    again = start(*words)
    again.says("Executing")
    assert osqbox.query("select pid from osquery_info") == [{"pid": str(again.process.pid)}]
    assert len([event for event in osqbox.events if event.kind == "node_enrolled"]) == 1
    assert again.stop() == 0


def test_a_carve_reaches_the_box(folder: Path, start: Start, osqbox: Osqbox) -> None:
    secret = folder / "secret.txt"
    secret.write_text("carve me")
    start(f"--flagfile={osqbox.flagfile}", f"--pidfile={folder}/pid", f"--database_path={folder}/db",
          "--disable_extensions", "--osqbox_carve_period=1")  # fmt: skip
    osqbox.wait_for("enroll", timeout=WAIT_S)
    rows = osqbox.query(f"select carve from carves where path = '{secret}' and carve = 1")
    assert rows == [{"carve": "1"}]
    osqbox.wait_for("carve", timeout=WAIT_S)


def test_no_configuration_at_the_start_ends_it_where_the_older_rule_is_asked_for(
    folder: Path, start: Start, osqbox: Osqbox
) -> None:
    """The server is real and enrolls it; only the path of the config leads nowhere."""
    daemon = start(
        f"--flagfile={osqbox.flagfile}", f"--pidfile={folder}/pid", f"--database_path={folder}/db",
        "--disable_extensions", "--config_tls_endpoint=/nowhere", "--config_tls_max_attempts=1",
        "--osqbox_strict_start",
    )  # fmt: skip
    daemon.says("cannot retrieve a configuration from")
    assert daemon.ended() == 1


def test_a_server_that_refuses_ends_it_with_78(folder: Path, start: Start, osqbox: Osqbox) -> None:
    daemon = start(
        f"--flagfile={osqbox.flagfile}", f"--pidfile={folder}/pid", f"--database_path={folder}/db",
        "--disable_extensions", "--enroll_secret_path=", "--enroll_secret_env=WRONG", "--tls_enroll_max_attempts=1",
        WRONG="not the secret",
    )  # fmt: skip
    daemon.says("No node key, TLS logging disabled.")
    assert daemon.ended() == 78
