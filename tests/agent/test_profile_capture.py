"""Capturing a machine: the profile loads, answers the same tables, agrees with itself, and gives nothing away."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from osqbox.agent.host import host_tables
from osqbox.agent.profile import Profile, load_profile
from osqbox.agent.profile.capture import capture
from osqbox.agent.profile.redaction import Redactor
from osqbox.agent.sql import Engine

NOW = 1_780_000_000.0
SECRETS = {
    "hostname": "zeppelin-db7.corp.acme.test",
    "uuid": "4C4C4544-0042-3510-8054-B4C04F4A4E32",
    "serial": "ZXSERIAL99",
    "disk serial": "DISKSER4711",
    "user": "margarethe",
    "gecos": "Margarethe Quux",
    "mac": "52:54:00:ab:cd:ef",
    "address": "10.77.66.55",
    "address6": "2001:678:abc::42",
    "peer": "93.184.216.34",
    "argument": "--token=s3cr3t-argument",
    "environment": "s3cr3t-environment",
    "repository": "https://margarethe:pw@mirror.acme.test/apt/",
    "mount": "/srv/merger-with-initech",
    "cron": "/home/margarethe/bin/pay-salaries --all",
    "domain": "corp.acme.test",
    "mail": "margarethe@acme.test",
    "file": "/home/margarethe/letter.odt",
    "socket": "/home/margarethe/.agent.sock",
    "group": "initech-merger",
}
Rows = dict[str, list[dict[str, str]]]


def machine() -> Rows:
    """A small machine with a secret in every place where one can be."""
    s = SECRETS
    process = {"pgroup": "1", "state": "S", "threads": "1", "nice": "0", "gid": "0", "resident_size": "9000000"}
    process |= {"user_time": "20", "start_time": "1779000000", "cwd": "/"}
    return {
        "system_info": [
            {
                "hostname": s["hostname"],
                "computer_name": s["hostname"],
                "local_hostname": s["hostname"],
                "uuid": s["uuid"],
                "hardware_serial": s["serial"],
                "board_serial": s["serial"],
                "cpu_brand": "CPU",
                "cpu_sockets": "1",
                "cpu_type": "x86_64",
                "cpu_physical_cores": "2",
                "cpu_logical_cores": "4",
                "physical_memory": str(8 * 2**30),
                "hardware_version": f"rev {s['serial']}",
            }
        ],
        "os_version": [
            {
                "name": "Debian",
                "version": "12",
                "major": "12",
                "minor": "0",
                "patch": "0",
                "platform": "debian",
                "platform_like": "",
                "codename": "bookworm",
                "arch": "x86_64",
                "build": "",
                "_id": "12",
            }
        ],
        "kernel_info": [
            {
                "version": "6.1.0",
                "arguments": f"root=UUID={s['uuid']} ip={s['address']}",
                "path": "/boot/vmlinuz",
                "device": s["uuid"],
            }
        ],
        "users": [
            {"uid": "0", "gid": "0", "username": "root", "description": "", "directory": "/root", "shell": "/bin/bash"},
            {
                "uid": "1000",
                "gid": "1000",
                "username": s["user"],
                "description": s["gecos"],
                "directory": f"/home/{s['user']}",
                "shell": "/bin/zsh",
            },
        ],
        "groups": [
            {"gid": "0", "groupname": "root"},
            {"gid": "1000", "groupname": s["user"]},
            {"gid": "1500", "groupname": s["group"]},
        ],
        "user_groups": [{"uid": "1000", "gid": "1000"}, {"uid": "1000", "gid": "1500"}],
        "block_devices": [
            {
                "name": "/dev/sda",
                "parent": "",
                "vendor": "V",
                "model": "M",
                "serial": s["disk serial"],
                "size": "83886080",
                "block_size": "512",
                "type": "",
            },
            {
                "name": "/dev/sda1",
                "parent": "/dev/sda",
                "vendor": "",
                "model": "",
                "serial": "",
                "size": "83884032",
                "block_size": "512",
                "type": "ext4",
            },
        ],
        "mounts": [
            {
                "device": "/dev/sda1",
                "path": "/",
                "type": "ext4",
                "flags": f"rw,upper={s['mount']}",
                "blocks": "1000",
                "blocks_free": "400",
                "blocks_size": "4096",
            },
            {
                "device": f"{s['hostname']}:{s['mount']}",
                "path": s["mount"],
                "type": "nfs",
                "flags": f"addr={s['address']}",
                "blocks": "0",
                "blocks_size": "0",
            },
        ],
        "interface_details": [
            {"interface": "eth0", "mac": s["mac"], "mtu": "1500", "link_speed": "1000", "pci_slot": ""}
        ],
        "interface_addresses": [
            {"interface": "eth0", "address": s["address"], "mask": "255.255.255.0"},
            {"interface": "eth0", "address": s["address6"], "mask": ""},
        ],
        "dns_resolvers": [{"type": "nameserver", "address": s["address"]}, {"type": "search", "address": s["domain"]}],
        "processes": [
            {
                **process,
                "pid": "1",
                "parent": "0",
                "name": "systemd",
                "path": "/usr/lib/systemd/systemd",
                "cmdline": "/sbin/init",
                "uid": "0",
            },
            {
                **process,
                "pid": "40",
                "parent": "1",
                "name": "sshd",
                "path": "/usr/sbin/sshd",
                "cmdline": f"sshd: {s['user']}@pts/0 {s['argument']}",
                "uid": "0",
            },
            {
                **process,
                "pid": "41",
                "parent": "40",
                "name": s["user"],
                "path": f"/home/{s['user']}/bin/tool",
                "cmdline": f"/home/{s['user']}/bin/tool {s['argument']}",
                "uid": "1000",
                "cwd": f"/home/{s['user']}/work",
            },
            {**process, "pid": "42", "parent": "1", "name": "gone", "path": "", "cmdline": "", "uid": "4242"},
        ],
        "process_envs": [
            {"pid": "41", "key": "TOKEN", "value": s["environment"]},
            {"pid": "41", "key": "HOME", "value": f"/home/{s['user']}"},
        ],
        "process_open_files": [
            {"pid": "41", "fd": "3", "path": s["file"]},
            {"pid": "40", "fd": "3", "path": f"/var/log/{s['hostname']}.log"},
        ],
        "process_open_sockets": [
            {
                "pid": "41",
                "fd": "5",
                "protocol": "6",
                "family": "2",
                "remote_address": s["peer"],
                "remote_port": "443",
                "state": "ESTABLISHED",
            },
            {
                "pid": "41",
                "fd": "6",
                "protocol": "6",
                "family": "10",
                "remote_address": s["address6"],
                "remote_port": "443",
                "state": "ESTABLISHED",
            },
        ],
        "listening_ports": [
            {"pid": "40", "protocol": "6", "family": "2", "address": "0.0.0.0", "port": "22", "path": ""},
            {"pid": "40", "protocol": "6", "family": "2", "address": s["address"], "port": "2222", "path": ""},
            {"pid": "41", "protocol": "0", "family": "1", "address": "", "port": "0", "path": s["socket"]},
        ],
        "deb_packages": [
            {"name": "openssh-server", "version": "1:9.2p1-2+deb12u6", "section": "net", "maintainer": s["mail"]}
        ],
        "python_packages": [
            {"name": "requests", "version": "2.0", "directory": f"/home/{s['user']}/.local/lib", "author": s["mail"]}
        ],
        "apt_sources": [
            {
                "name": s["repository"],
                "source": f"/etc/apt/sources.list.d/{s['user']}.list",
                "base_uri": s["repository"],
                "release": s["user"],
                "components": "",
                "maintainer": s["mail"],
            },
            {
                "name": "x",
                "source": "/etc/apt/sources.list",
                "base_uri": "http://deb.debian.org/debian",
                "release": "bookworm",
                "components": "main",
                "maintainer": "",
            },
        ],
        "crontab": [
            {"minute": "1", "command": f"{s['user']} {s['cron']}", "path": f"/var/spool/cron/crontabs/{s['user']}"}
        ],
        "system_controls": [
            {"name": "kernel.hostname", "current_value": s["hostname"], "config_value": s["hostname"]},
            {"name": "kernel.domainname", "current_value": s["domain"], "config_value": ""},
            {"name": "vm.swappiness", "current_value": "60", "config_value": ""},
        ],
        "etc_services": [
            {"name": "ssh", "port": "22", "protocol": "tcp", "aliases": "", "comment": f"ask {s['mail']}"}
        ],
        "known_to_nobody": [],
        "authorized_keys": [{"uid": "1000", "key": s["argument"], "comment": s["mail"]}],
    }


def describe(rows: Rows, *, redact: bool) -> dict[str, Any]:
    rows = {name: found for name, found in rows.items() if name != "known_to_nobody"}
    return capture(lambda name: rows[name], rows, name="captured", redact=redact, now=NOW)


def loaded(document: dict[str, Any], folder: Path) -> Profile:
    file = folder / "captured.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_profile(file)


def everything(value: Any) -> Iterator[str]:
    """Every text of a document, keys too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from everything(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from everything(inner)
    else:
        yield str(value)


def words(secret: str) -> set[str]:
    """The telling parts of a secret."""
    parts = {part for part in re.split(r"[/@:= ]", secret) if len(part) > 3}
    return {secret, *parts} - {"https", "home", "corp"}


@pytest.mark.parametrize("kind", sorted(SECRETS))
def test_no_secret_of_the_machine_is_in_a_redacted_profile(kind: str) -> None:
    text = "\n".join(everything(describe(machine(), redact=True))).lower()
    for word in words(SECRETS[kind]):
        if word not in ("--all", "abc", "2001", "srv"):
            assert word.lower() not in text, word


@pytest.mark.parametrize(
    "kind", ["hostname", "user", "argument", "environment", "address", "disk serial", "serial", "cron"]
)
def test_without_redaction_it_is_there(kind: str) -> None:
    """So the test above looks where secrets would be."""
    assert SECRETS[kind] in "\n".join(everything(describe(machine(), redact=False)))


@pytest.mark.parametrize("redact", [True, False])
def test_it_loads_and_keeps_the_shape(redact: bool, tmp_path: Path) -> None:
    profile = loaded(describe(machine(), redact=redact), tmp_path)
    tables = profile.host(seed=1).tables(lambda: NOW)
    assert profile.table_names >= set(machine()) - {"known_to_nobody"}
    engine = Engine(schema=profile.schema)

    def ask(sql: str) -> list[dict[str, str]]:
        return engine.query(sql, tables=tables).rows

    tree = ask("select p.name as child, q.name as parent, u.uid from processes p join processes q on p.parent = q.pid "
               "join users u using (uid) order by u.uid")  # fmt: skip
    assert [(row["parent"], row["uid"]) for row in tree] == [("systemd", "0"), ("sshd", "1000"), ("systemd", "4242")]
    assert ask("select name, version from deb_packages") == [{"name": "openssh-server", "version": "1:9.2p1-2+deb12u6"}]
    ports = ask("select port, name from listening_ports join processes using (pid) where port > 0 order by port")
    assert ports == [{"port": "22", "name": "sshd"}, {"port": "2222", "name": "sshd"}]
    assert ask("select cpu_logical_cores as c, physical_memory / 1073741824 as g from system_info") == [
        {"c": "4", "g": "8"}
    ]
    assert ask("select path, type from mounts where device = '/dev/sda1'") == [{"path": "/", "type": "ext4"}]
    assert ask("select count(*) as n from user_groups where uid = 1000") == [{"n": "2"}]
    (public,) = ask("select base_uri from apt_sources where release = 'bookworm'")
    assert public == {"base_uri": "http://deb.debian.org/debian"}


def test_the_same_thing_has_the_same_stand_in() -> None:
    document = describe(machine(), redact=True)
    names = [user["name"] for user in document["base"]["users"]]
    assert names == ["root", "user1", "uid4242"]
    (sshd,) = [p for p in document["base"]["processes"] if p["name"] == "sshd"]
    (tool,) = sshd["children"]
    assert tool["user"] == tool["name"] == "user1"
    assert "user1" in document["base"]["groups"]


@pytest.mark.skipif(sys.platform != "linux", reason="the tables are read from /proc")
def test_this_machine(tmp_path: Path) -> None:
    """Captured with a child whose argument and environment are known: they are not in it, and its tables agree."""
    script = "print(flush=True); import sys; sys.stdin.read()"
    command = [sys.executable, "-c", script, "an-argument-of-mine"]
    secret = {"MY_KEY": "a-value-of-mine"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=secret) as child:
        assert child.stdout is not None
        child.stdout.readline()
        tables, engine = host_tables(), Engine()
        open_now: dict[str, list[dict[str, str]]] = {name: engine.raw_rows(name, tables=tables) for name in tables}
        child.communicate()
    document = capture(lambda name: open_now[name], tables, name="this", redact=True, now=NOW)
    text = "\n".join(everything(document))
    plain = "\n".join(everything(capture(lambda name: open_now[name], tables, name="this", redact=False, now=NOW)))
    system = open_now["system_info"][0]
    cards = [row["mac"] for row in open_now["interface_details"] if row["mac"] not in ("", "00:00:00:00:00:00")]
    addresses = [
        row["address"] for row in open_now["interface_addresses"] if row["address"] not in ("127.0.0.1", "::1")
    ]
    for value in (
        "an-argument-of-mine",
        "a-value-of-mine",
        *cards,
        *addresses,
        system["uuid"],
        system["hardware_serial"],
    ):
        assert not value or value not in text, value
    assert "an-argument-of-mine" in plain
    assert "a-value-of-mine" in plain
    profile = loaded(document, tmp_path)
    assert profile.table_names >= set(tables) - {"known_to_nobody"}
    host = profile.host(seed=1).tables(lambda: NOW + 60)
    for sql in (
        "select pid from processes left join users u using (uid) where u.uid is null",
        "select pid from processes where parent != 0 and parent not in (select pid from processes)",
        "select pid from listening_ports where pid not in (select pid from processes)",
        "select gid from user_groups where gid not in (select gid from groups)",
    ):
        found = Engine(schema=profile.schema).query(sql, tables=host)
        assert (found.status, found.rows) == (0, []), sql


# -- the redactor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ada logs in to web1", "user1 logs in to host1"),
        ("ADA, Ada_backup and WEB1", "user1, user1_backup and host1"),
        ("adapter", "adapter"),
        ("from 10.1.2.3 and 10.1.2.3", "from 198.18.0.2 and 198.18.0.2"),
        ("127.0.0.1 and 0.0.0.0", "127.0.0.1 and 0.0.0.0"),
        ("fe80::1%eth0", "2001:db8::1%eth0"),
        ("at 12:34:56", "at 12:34:56"),
        ("aa:bb:cc:dd:ee:ff", "02:00:00:00:00:01"),
        ("5.15.0-141", "5.15.0-141"),
        ("", ""),
    ],
)
def test_texts_are_redacted(text: str, expected: str) -> None:
    assert Redactor([("ada", "user"), ("web1", "host")], enabled=True).text(text) == expected
    assert Redactor([("ada", "user"), ("web1", "host")], enabled=False).text(text) == text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("/var/log/ada.log", "/var/log/user1.log"),
        ("/home/ada/x", "/path1/path2/path3"),
        ("/var/home/ada/x", "/path1/path2/path3/path4"),
        ("/usrlocal/x", "/path1/path2"),
        ("", ""),
    ],
)
def test_paths_are_redacted(path: str, expected: str) -> None:
    assert Redactor([("ada", "user")], enabled=True).path(path) == expected


@given(st.text(), st.text(min_size=2))
def test_a_redactor_takes_any_text(text: str, secret: str) -> None:
    redactor = Redactor([(secret, "user")], enabled=True)
    assert redactor.arguments(text) == redactor.arguments(text)
    assert redactor.path(text) == redactor.path(text)
    assert isinstance(redactor.text(text), str)
    assert redactor.text("") == ""
