"""This machine's tables against what Python and psutil say of the same machine."""

from __future__ import annotations

import grp
import hashlib
import os
import platform
import pwd
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from osqbox.agent.host import host_tables
from osqbox.agent.sql import Engine
from osqbox.schema import load_schema

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tables are read from /proc")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(host_tables())


def ask(engine: Engine, sql: str) -> list[dict[str, str]]:
    result = engine.query(sql)
    assert (result.status, result.message) == (0, "")
    return result.rows


@pytest.mark.parametrize("name", sorted(host_tables()))
def test_every_table_answers_and_knows_its_columns(engine: Engine, name: str) -> None:
    table = load_schema()[name]
    where = "where path = '/etc/passwd'" if table.required else ""
    ask(engine, f"select * from {name} {where} limit 500")
    known = {column.name for column in table.all_columns} | {"_id"}
    extra = {key for row in engine.raw_rows(name)[:50] for key in row} - known
    assert extra == set()


def test_this_process(engine: Engine) -> None:
    (row,) = ask(engine, f"select * from processes where pid = {os.getpid()}")
    me = psutil.Process()
    assert row["name"] == me.name()
    assert row["parent"] == str(os.getppid())
    assert row["cmdline"] == " ".join(me.cmdline()).rstrip()
    assert row["path"] == os.path.realpath(sys.executable)
    assert row["cwd"] == str(Path.cwd())
    assert row["on_disk"] == "1"
    assert (row["uid"], row["euid"], row["gid"]) == (str(os.getuid()), str(os.geteuid()), str(os.getgid()))
    assert abs(int(row["start_time"]) - me.create_time()) <= 2
    assert abs(int(row["resident_size"]) - me.memory_info().rss) < 50 * 1024 * 1024
    assert abs(int(row["user_time"]) - me.cpu_times().user * 1000) < 2000


def test_a_process_that_is_not_there(engine: Engine) -> None:
    assert ask(engine, "select * from processes where pid in (-1, 0, 99999999)") == []
    assert ask(engine, "select * from process_envs where pid = 'x'") == []


def test_a_child_is_seen_with_its_environment_and_files(engine: Engine, tmp_path: Path) -> None:
    script = "import sys; f = open(sys.argv[1], 'w'); print(flush=True); sys.stdin.read()"
    file = tmp_path / "held open"
    command = [sys.executable, "-c", script, str(file)]
    environment = {"OSQBOX_TEST": "a=b"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        child.stdout.readline()
        envs = ask(engine, f"select value from process_envs where pid = {child.pid} and key = 'OSQBOX_TEST'")
        files = ask(engine, f"select path from process_open_files where pid = {child.pid}")
        child.communicate()
    assert envs == [{"value": "a=b"}]
    assert {"path": str(file)} in files


def test_processes_join_users(engine: Engine) -> None:
    rows = ask(engine, "select p.pid, u.username from processes p join users u using (uid)")
    assert {"pid": str(os.getpid()), "username": pwd.getpwuid(os.getuid()).pw_name} in rows


def test_users_and_groups(engine: Engine) -> None:
    names = {row["username"] for row in ask(engine, "select username from users")}
    assert names == {account.pw_name for account in pwd.getpwall()}
    (root,) = ask(engine, "select uid, directory, shell from users where username = 'root'")
    assert (root["uid"], root["directory"]) == ("0", pwd.getpwnam("root").pw_dir)
    assert ask(engine, "select groupname from groups where gid = 0") == [{"groupname": grp.getgrgid(0).gr_name}]
    assert ask(engine, "select * from users where uid = 123456789") == []


def test_a_listening_socket_and_its_owner(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        columns = "l.address, l.protocol, l.family, p.pid"
        sql = f"select {columns} from listening_ports l join processes p using (pid) where l.port = {port}"
        assert ask(engine, sql) == [{"address": "127.0.0.1", "protocol": "6", "family": "2", "pid": str(os.getpid())}]
        sockets = ask(
            engine, f"select state, fd from process_open_sockets where pid = {os.getpid()} and local_port = {port}"
        )
        assert sockets == [{"state": "LISTEN", "fd": str(server.fileno())}]


def test_an_ipv6_address_is_read_in_host_order(engine: Engine) -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        rows = ask(engine, f"select address from listening_ports where port = {server.getsockname()[1]}")
    assert rows == [{"address": "::1"}]


def test_system_and_os(engine: Engine) -> None:
    (system,) = ask(engine, "select * from system_info")
    assert system["hostname"] == platform.node()
    assert system["cpu_logical_cores"] == str(os.cpu_count())
    assert system["physical_memory"] == str(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    (version,) = ask(engine, "select * from os_version")
    known = platform.freedesktop_os_release()
    assert (version["name"], version["platform"]) == (known["NAME"], known["ID"])
    assert engine.raw_rows("os_version")[0]["_id"] == known.get("VERSION_ID", "")


def test_identity_can_be_overridden() -> None:
    engine = Engine(host_tables(hostname="web-1", uuid="U", now=lambda: 1786052772.9))
    (row,) = ask(engine, "select hostname, uuid, computer_name from system_info")
    assert row == {"hostname": "web-1", "uuid": "U", "computer_name": "web-1"}
    (row,) = ask(engine, "select weekday, unix_time, iso_8601, timestamp from time")
    assert row == {
        "weekday": "Thursday",
        "unix_time": "1786052772",
        "iso_8601": "2026-08-06T21:46:12Z",
        "timestamp": "Thu Aug  6 21:46:12 2026 UTC",
    }


def test_memory_load_uptime_mounts(engine: Engine) -> None:
    (memory,) = ask(engine, "select memory_total from memory_info")
    assert memory["memory_total"] == str(psutil.virtual_memory().total)
    assert [row["period"] for row in ask(engine, "select period from load_average")] == ["1m", "5m", "15m"]
    (uptime,) = ask(engine, "select * from uptime")
    whole = int(uptime["days"]) * 86400 + int(uptime["hours"]) * 3600 + int(uptime["minutes"]) * 60
    assert whole + int(uptime["seconds"]) == int(uptime["total_seconds"]) > 0
    found = os.statvfs("/proc/self")
    (proc,) = ask(engine, "select type, blocks_size from mounts where path = '/proc'")
    assert proc == {"type": "proc", "blocks_size": str(found.f_bsize)}


# -- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "c.log", "sub/d.txt", "sub/deep/e.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("path = '{}/a.txt'", ["a.txt"]),
        ("path = '{}/nothing'", []),
        ("path like '{}/%.txt'", ["a.txt", "b.txt"]),
        ("path like '{}/%'", ["a.txt", "b.txt", "c.log", "link", "loop", "sub"]),
        ("path like '{}/%%'", ["a.txt", "b.txt", "c.log", "d.txt", "deep", "e.txt", "link", "loop", "sub"]),
        ("path like '{}/sub%/d.txt'", ["d.txt"]),
        ("directory = '{}/sub'", ["d.txt", "deep"]),
        ("directory like '{}/sub%'", ["d.txt", "deep"]),
        ("path in ('{0}/a.txt', '{0}/c.log')", ["a.txt", "c.log"]),
        ("path = 'relative'", []),
    ],
)
def test_files_by_path_pattern_and_directory(engine: Engine, tree: Path, where: str, names: list[str]) -> None:
    rows = ask(engine, f"select filename from file where {where.format(tree)} order by filename")
    assert [row["filename"] for row in rows] == names


def test_what_a_file_says(engine: Engine, tree: Path) -> None:
    (tree / "a.txt").chmod(0o4750)
    (row,) = ask(engine, f"select * from file where path = '{tree}/a.txt'")
    found = (tree / "a.txt").stat()
    assert (row["size"], row["mode"], row["type"], row["symlink"]) == ("5", "4750", "regular", "0")
    assert (row["inode"], row["mtime"]) == (str(found.st_ino), str(int(found.st_mtime)))
    (row,) = ask(engine, f"select type, symlink, symlink_target_path from file where path = '{tree}/link'")
    assert row == {"type": "regular", "symlink": "1", "symlink_target_path": f"{tree}/a.txt"}


def test_hashes(engine: Engine, tree: Path) -> None:
    (row,) = ask(engine, f"select sha256, md5 from hash where path = '{tree}/a.txt'")
    assert row == {"sha256": hashlib.sha256(b"a.txt").hexdigest(), "md5": hashlib.md5(b"a.txt").hexdigest()}
    assert ask(engine, f"select * from hash where path = '{tree}/sub'") == []
    joined = f"select f.filename, h.sha1 from file f join hash h using (path) where f.path like '{tree}/%.log'"
    assert ask(engine, joined) == [{"filename": "c.log", "sha1": hashlib.sha1(b"c.log").hexdigest()}]


def test_a_file_over_read_max_is_not_hashed(tree: Path) -> None:
    engine = Engine(host_tables(read_max_bytes=4))
    result = engine.query(f"select sha256 from hash where path = '{tree}/a.txt'")
    assert result.rows == [{"sha256": ""}]
    assert len(result.warnings) == 1


def test_reading_a_pipe_does_not_hang(engine: Engine, tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    assert ask(engine, f"select * from hash where path = '{tree}/pipe'") == []
    assert ask(engine, f"select type from file where path = '{tree}/pipe'") == [{"type": "fifo"}]


def test_a_search_through_everything_ends_at_its_deadline(engine: Engine) -> None:
    result = engine.query("select count(*) from file where path like '/%%'", timeout_s=0.2)
    assert result.status == 0 or result.message.startswith("interrupted")


def test_python_packages_of_a_directory(engine: Engine, tmp_path: Path) -> None:
    info = tmp_path / "thing-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: thing\nVersion: 1.2\nSummary: A thing\n\nName: body\n")
    rows = ask(engine, f"select name, version, summary from python_packages where directory = '{tmp_path}'")
    assert rows == [{"name": "thing", "version": "1.2", "summary": "A thing"}]


def test_deb_packages_of_an_admindir(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "status").write_text(
        "Package: one\nStatus: install ok installed\nVersion: 1:2.0-3\nDescription: x\n continued: y\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n"
    )
    rows = ask(engine, f"select name, version, revision from deb_packages where admindir = '{tmp_path}'")
    assert rows == [{"name": "one", "version": "1:2.0-3", "revision": "3"}]


def test_a_kernel_parameter(engine: Engine) -> None:
    rows = ask(engine, "select current_value, subsystem from system_controls where name = 'kernel.ostype'")
    assert rows == [{"current_value": "Linux", "subsystem": "kernel"}]
    assert ask(engine, "select * from system_controls where name = '....etc.passwd'") == []
