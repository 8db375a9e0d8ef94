"""Pretended hosts, asked by SQL through the real engine: their tables agree with each other, and with themselves."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from osqbox.agent.profile import Host, Profile, load_profile, shipped_profiles
from osqbox.agent.profile.description import fill, split_version
from osqbox.agent.profile.dice import Dice
from osqbox.agent.sql import Engine, Tables
from osqbox.errors import BadSetup
from osqbox.schema import load_schema

NOW = 1_780_000_000.0
LINUX = ("debian", "rhel", "ubuntu")
SHAPES = (*LINUX, "macos", "windows")
PACKAGES = {
    "debian": "deb_packages",
    "ubuntu": "deb_packages",
    "rhel": "rpm_packages",
    "macos": "apps",
    "windows": "programs",
}
WHERE = dict.fromkeys(("file", "hash"), "where path like '/%%' or path like 'C:%%'")


@pytest.fixture(scope="module")
def profiles() -> dict[str, Profile]:
    return {name: load_profile(name) for name in SHAPES}


@pytest.fixture(scope="module")
def engines(profiles: dict[str, Profile]) -> dict[str, Engine]:
    return {name: Engine(schema=profile.schema) for name, profile in profiles.items()}


def ask(engine: Engine, sql: str, tables: Tables) -> list[dict[str, str]]:
    result = engine.query(sql, tables=tables)
    assert (result.status, result.message) == (0, ""), sql
    return result.rows


def at(host: Host, now: float) -> Tables:
    return host.tables(lambda: now, standalone=True)


def test_the_shapes_are_shipped() -> None:
    assert shipped_profiles() == sorted(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_table_has_rows_on_some_host_and_only_columns_of_the_schema(
    shape: str, profiles: dict[str, Profile], engines: dict[str, Engine]
) -> None:
    profile, engine = profiles[shape], engines[shape]
    filled = set()
    for index in range(6):
        tables = at(profile.host(seed=1, index=index), NOW + 7000 * index)
        for name in tables:
            if ask(engine, f"select * from {name} {WHERE.get(name, '')}", tables):
                filled.add(name)
            known = {column.name for column in profile.schema[name].all_columns} | {"_id"}
            assert {key for row in engine.raw_rows(name, tables=tables) for key in row} <= known, name
    assert filled == profile.table_names | {"osquery_info"}
    assert len(filled) >= (55 if shape in LINUX else 35)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_have_the_types_of_their_columns(
    shape: str, profiles: dict[str, Profile], engines: dict[str, Engine]
) -> None:
    """A text that is no number in a column of numbers would be NULL."""
    tables = at(profiles[shape].host(seed=1, index=2), NOW)
    for name in tables:
        numeric = [c.name for c in profiles[shape].schema[name].all_columns if c.type != "TEXT"]
        for row in engines[shape].raw_rows(name, tables=tables):
            for column in numeric:
                value = row.get(column, "")
                assert value == "" or value.lstrip("-").replace(".", "", 1).isdigit(), (name, column, value)


def test_tables_of_linux_are_those_of_the_schema(profiles: dict[str, Profile]) -> None:
    linux = {table.name for table in load_schema()}
    for name in LINUX:
        assert profiles[name].table_names <= linux
    assert "deb_packages" not in profiles["macos"].schema
    assert "apps" not in profiles["windows"].schema


def test_an_engine_for_linux_learns_the_tables_of_other_platforms(profiles: dict[str, Profile]) -> None:
    """One engine may serve hosts of all platforms; each has the tables of its own."""
    engine = Engine()
    mac, debian = (profiles[name].host(seed=1).tables(lambda: NOW) for name in ("macos", "debian"))
    assert ask(engine, "select name from apps where name = 'Slack.app'", mac) == [{"name": "Slack.app"}]
    assert engine.query("select * from apps", tables=debian).message == "no such table: apps"
    assert len(ask(engine, "select config_flag from sip_config", mac)) == 5


# -- agreement between tables ------------------------------------------------------------------------------------

EVERYWHERE = [
    "select pid from processes p left join users u using (uid) where u.uid is null",
    "select pid from processes where parent != 0 and parent not in (select pid from processes)",
    "select p.pid from processes p join processes q on p.parent = q.pid where p.start_time < q.start_time",
    "select pid from processes group by pid having count(*) > 1",
    "select pid from processes p, time t where p.start_time > t.unix_time",
    "select pid from processes p, time t, uptime u where p.start_time < t.unix_time - u.total_seconds",
    "select pid from process_open_sockets where pid not in (select pid from processes)",
    "select pid from listening_ports where pid not in (select pid from processes)",
    "select socket from listening_ports where socket not in (select socket from process_open_sockets)",
    "select socket from process_open_sockets group by socket having count(*) > 1",
    "select pid from process_open_sockets group by pid, fd having count(*) > 1",
    ("select local_address from process_open_sockets where state = 'ESTABLISHED' "
    "and local_address not in (select address from interface_addresses)"),
    "select uid from user_groups where uid not in (select uid from users)",
    "select gid from user_groups where gid not in (select gid from groups)",
    "select uid from users where gid not in (select gid from groups)",
    "select uid from users group by uid having count(*) > 1",
    "select username from users group by username having count(*) > 1",
    "select user from logged_in_users where user not in (select username from users)",
    "select pid from logged_in_users where pid not in (select pid from processes)",
    "select l.pid from logged_in_users l join processes p using (pid) where l.time != p.start_time",
    "select interface from interface_addresses where interface not in (select interface from interface_details)",
    "select interface from routes where interface not in (select interface from interface_details)",
    "select interface from arp_cache where interface not in (select interface from interface_details)",
    "select mac from arp_cache where mac in (select mac from interface_details)",
    "select gateway from routes where gateway != '' and gateway not in (select address from arp_cache)",
    ("select i.pid from osquery_info i left join processes p using (pid) "
    "where p.pid is null or p.name not like 'osqueryd%' or p.start_time != i.start_time or p.parent != i.watcher"),
    "select 1 from osquery_info i, system_info s where i.uuid != s.uuid",
    "select 1 from uptime where total_seconds < 1 or days != total_seconds / 86400",
    "select 1 from system_info where cpu_physical_cores > cpu_logical_cores",
    "select path from processes p where path != '' and not exists (select 1 from file f where f.path = p.path)",
]  # fmt: skip
OSQUERY = next(sql for sql in EVERYWHERE if "osquery_info" in sql)
ON_POSIX = [
    "select pid from process_open_files where pid not in (select pid from processes)",
    "select device from mounts where device like '/dev/%' and device not in (select name from block_devices)",
    "select parent from block_devices where parent != '' and parent not in (select name from block_devices)",
    "select name from disk_encryption where name not in (select name from block_devices)",
    "select path from mounts where blocks_available > blocks_free or blocks_free > blocks",
    "select username from last where username not in (select username from users)",
    "select l.time from last l, time t where l.time > t.unix_time",
    (
        "select pid from logged_in_users u where not exists "
        "(select 1 from last l where l.pid = u.pid and l.time = u.time and l.username = u.user and l.type = 7)"
    ),
    (
        "select core from cpu_time c, uptime u where user + nice + system + idle + iowait + softirq "
        "not between 99 * total_seconds and 101 * total_seconds"
    ),
    "select 1 from (select count(*) as n from cpu_time) c, system_info s where c.n != s.cpu_logical_cores",
    "select pid from process_memory_map where pid not in (select pid from processes)",
]
ON_LINUX = [
    "select uid from authorized_keys where uid not in (select uid from users)",
    "select pid from process_namespaces where pid not in (select pid from processes)",
    "select username from shadow where username not in (select username from users)",
    (
        "select 1 from memory_info, system_info where memory_total > physical_memory "
        "or memory_available > memory_total or memory_free + buffers + cached > memory_total or swap_free > swap_total"
    ),
    (
        "select 1 from memory_info where memory_total - memory_available "
        "< (select sum(resident_size) from processes) and memory_available * 9 > memory_total"
    ),
    "select user from systemd_units where user != '' and user not in (select username from users)",
    (
        "select current_value from system_controls c, system_info s where name = 'kernel.hostname' "
        "and current_value != hostname"
    ),
    (
        "select current_value from system_controls c, kernel_info k where name = 'kernel.osrelease' "
        "and current_value != version"
    ),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_tables_agree(shape: str, profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    """No query finds a row that contradicts another table, for several hosts at several times."""
    queries = EVERYWHERE + (ON_POSIX if shape != "windows" else []) + (ON_LINUX if shape in LINUX else [])
    for seed, index, now in ((1, 0, NOW), ("x", 5, NOW + 12_345), (2, 999, NOW + 90 * 86_400), (3, 70_000, NOW + 1e8)):
        tables = at(profiles[shape].host(seed=seed, index=index), now)
        for sql in queries:
            assert ask(engines[shape], sql, tables) == [], (sql, seed, index, now)


@settings(max_examples=25, deadline=None)
@example(shape="debian", seed=400, index=74, now=3231512885.0)  # two clients' sockets had one number
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.one_of(st.integers(), st.text(max_size=5)),
    index=st.integers(0, 100_000),
    now=st.floats(1_748_736_000, 4_000_000_000),
)
def test_tables_agree_for_any_seed_and_time(
    profiles: dict[str, Profile], engines: dict[str, Engine], shape: str, seed: int | str, index: int, now: float
) -> None:
    tables = at(profiles[shape].host(seed=seed, index=index), now)
    for sql in (*EVERYWHERE[:10], *EVERYWHERE[17:20], OSQUERY):
        assert ask(engines[shape], sql, tables) == [], sql


@pytest.mark.parametrize("now", [-1e9, 0, 1.0, 1_700_000_000, 1_748_736_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_times_before_the_profile_was_made(
    shape: str, now: float, profiles: dict[str, Profile], engines: dict[str, Engine]
) -> None:
    """A virtual clock may start anywhere: the packages then are as the profile lists them."""
    tables = at(profiles[shape].host(seed=1), now)
    for sql in (*EVERYWHERE[:10], OSQUERY):
        assert ask(engines[shape], sql, tables) == [], sql
    listed = ask(engines[shape], f"select name, {_version(shape)} as version from {PACKAGES[shape]} limit 1", tables)
    assert len(listed) == 1


def _version(shape: str) -> str:
    return "bundle_short_version" if shape == "macos" else "version"


@pytest.mark.parametrize("shape", LINUX)
def test_a_daemon_is_as_new_as_its_package(
    shape: str, profiles: dict[str, Profile], engines: dict[str, Engine]
) -> None:
    """sshd was started again when openssh-server was upgraded."""
    profile = profiles[shape]
    host = profile.host(seed=4, index=1)
    sshd = "select start_time, pid from processes where name = 'sshd' and cmdline like '%listener%'"
    server = f"select version || ' ' || {'release' if shape == 'rhel' else 'revision'} as v from {PACKAGES[shape]}"
    server += " where name = 'openssh-server'"
    versions: dict[str, set[str]] = {}
    for day in range(200):
        tables = at(host, NOW + day * 86_400)
        (daemon,), (package,) = ask(engines[shape], sshd, tables), ask(engines[shape], server, tables)
        versions.setdefault(package["v"], set()).add(daemon["start_time"])
    assert len(versions) >= 3
    starts = list(versions.values())
    assert all(not here & there for at_, here in enumerate(starts) for there in starts[at_ + 1 :])


def test_programs_are_of_packages_that_are_installed(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    """nginx runs exactly where nginx is installed; both happen."""
    seen = set()
    for index in range(20):
        tables = at(profiles["ubuntu"].host(seed=9, index=index), NOW)
        installed = ask(engines["ubuntu"], "select 1 from deb_packages where name = 'nginx'", tables)
        running = ask(engines["ubuntu"], "select 1 from processes where name = 'nginx'", tables)
        listening = ask(engines["ubuntu"], "select 1 from listening_ports where port = 80", tables)
        unit = ask(engines["ubuntu"], "select 1 from systemd_units where id = 'nginx.service'", tables)
        assert bool(installed) == bool(running) == bool(listening) == bool(unit)
        seen.add(bool(installed))
    assert seen == {True, False}


# -- the same again, and change ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_arguments_give_the_same_rows(shape: str, engines: dict[str, Engine]) -> None:
    """Also from a profile loaded again, after other moments were looked at, and in another order."""
    first, second = (load_profile(shape).host(seed="s", index=3) for _ in range(2))
    names = list(at(first, NOW))
    rows = {name: engines[shape].raw_rows(name, tables=at(first, NOW)) for name in names}
    ask(engines[shape], "select * from processes", at(second, NOW + 1e6))
    again = {name: engines[shape].raw_rows(name, tables=at(second, NOW)) for name in reversed(names)}
    assert again == rows


def test_the_identity_is_what_the_tables_say(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    for shape in SHAPES:
        host = profiles[shape].host(seed=7, index=3)
        sql = "select hostname, s.uuid, hardware_serial, platform, platform_mask, i.instance_id "
        (info,) = ask(engines[shape], sql + "from system_info s, os_version, osquery_info i", at(host, NOW))
        assert info == {
            "hostname": host.identity.hostname,
            "uuid": host.identity.uuid,
            "hardware_serial": host.identity.hardware_serial,
            "platform": host.identity.platform,
            "platform_mask": str(host.identity.platform_type),
            "instance_id": host.identity.instance_id,
        }


def test_a_seed_is_the_same_as_number_and_as_text(profiles: dict[str, Profile]) -> None:
    hosts = [profiles["ubuntu"].host(seed=seed) for seed in (7, "7", 8)]
    assert hosts[0].identity == hosts[1].identity != hosts[2].identity


def test_rolls_are_the_same_on_every_machine_and_python() -> None:
    assert Dice("a", 1).roll("b", 2) == 10945235516851128908


@pytest.mark.parametrize("shape", SHAPES)
def test_a_minute_makes_a_difference(shape: str, profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    """Rows are added and removed between two looks 60 s apart, on every host and at any time."""
    for index in range(10):
        host, then = profiles[shape].host(seed=5, index=index), NOW + index * 54_321
        looks = [
            {tuple(row.values()) for row in ask(engines[shape], "select pid, name from processes", at(host, then + s))}
            for s in (0, 60)
        ]
        assert looks[1] - looks[0]
        assert looks[0] - looks[1]
        assert len(looks[0] & looks[1]) > len(looks[0]) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_packages_are_upgraded_within_days(
    shape: str, profiles: dict[str, Profile], engines: dict[str, Engine]
) -> None:
    host = profiles[shape].host(seed=5)
    columns = f"name, {_version(shape)} as version" + (", release" if shape == "rhel" else "")
    sql = f"select {columns} from {PACKAGES[shape]}"
    changed = 0
    for day in range(10):
        here, there = (ask(engines[shape], sql, at(host, NOW + d * 7 * 86_400)) for d in (day, day + 1))
        assert [row["name"] for row in here] == [row["name"] for row in there]
        changed += here != there
    assert changed >= 8


def test_time_only_moves_on(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    """Over half a year: uptime is the time since a boot that stays, and counters of one boot never fall."""
    host = profiles["ubuntu"].host(seed=6)
    boots: list[int] = []
    received = 0
    sql = "select t.unix_time - u.total_seconds as boot, d.ibytes from time t, uptime u, interface_details d "
    sql += "where d.interface = 'ens5'"
    for hour in range(0, 180 * 24, 6):
        (row,) = ask(engines["ubuntu"], sql, at(host, NOW + hour * 3600))
        boot, now_received = int(row["boot"]), int(row["ibytes"])
        if boots and boots[-1] == boot:
            assert now_received > received
        else:
            boots.append(boot)
        received = now_received
    assert boots == sorted(set(boots))
    assert 4 <= len(boots) <= 9


def test_people_log_in_and_out(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    host = profiles["debian"].host(seed=6)
    counts = set()
    for hour in range(48):
        tables = at(host, NOW + hour * 3600)
        here = ask(engines["debian"], "select user, tty, host, pid from logged_in_users", tables)
        counts.add(len(here))
        sessions = ask(engines["debian"], "select pid from processes where cmdline like 'sshd: % [priv]' "
                       "and cmdline not like '%unknown%'", tables)  # fmt: skip
        assert {row["pid"] for row in here} == {row["pid"] for row in sessions}
    assert len(counts) > 1


def test_a_session_that_ended_is_in_last(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    host = profiles["rhel"].host(seed=6)
    for hour in range(24):
        tables = at(host, NOW + hour * 3600)
        for row in ask(engines["rhel"], "select user, pid, time from logged_in_users", tables):
            later = at(host, NOW + hour * 3600 + 4 * 3600)
            found = ask(
                engines["rhel"], f"select type, username from last where pid = {row['pid']} order by time", later
            )
            assert found == [{"type": "7", "username": row["user"]}, {"type": "8", "username": row["user"]}]
            return
    pytest.fail("nobody logged in for a day")


# -- hosts differ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_hosts_of_one_profile_differ(shape: str, profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    hosts = [profiles[shape].host(seed=1, index=index) for index in range(300)]
    identities = [host.identity for host in hosts]
    assert len({identity.hostname for identity in identities}) == 300
    assert len({identity.uuid for identity in identities}) == 300
    assert len({identity.instance_id for identity in identities}) == 300
    assert len({identity.platform_type for identity in identities}) == 1
    for sql in (
        "select a.address, d.mac from interface_addresses a join interface_details d using (interface)",
        "select pid from processes",
        "select group_concat(username) from users",
    ):
        answers = {str(ask(engines[shape], sql, at(host, NOW))) for host in hosts[:12]}
        assert len(answers) > 4, sql


def test_neighbours_know_each_others_hardware_address(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    here, there = (profiles["rhel"].host(seed=1, index=index) for index in (4, 5))
    (card,) = ask(engines["rhel"], "select a.address, d.mac from interface_addresses a join interface_details d using "
                  "(interface) where interface = 'ens192' and address not like '%:%'", at(there, NOW))  # fmt: skip
    known = [ask(engines["rhel"], "select address, mac from arp_cache", at(here, NOW + s)) for s in range(0, 3000, 300)]
    assert any(card in rows for rows in known)


def test_duplicate_hardware(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    """Cloned machines have one hardware UUID and serial, and are two hosts all the same."""
    original, clone = profiles["ubuntu"].host(seed=1, index=2), profiles["ubuntu"].host(seed=1, index=8, hardware_of=2)
    hardware = "select uuid, hardware_serial, hardware_model, physical_memory from system_info"
    assert ask(engines["ubuntu"], hardware, at(original, NOW)) == ask(engines["ubuntu"], hardware, at(clone, NOW))
    assert original.identity.uuid == clone.identity.uuid
    assert original.identity.hostname != clone.identity.hostname
    assert original.identity.instance_id != clone.identity.instance_id


def test_clock_skew(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    host = profiles["debian"].host(seed=1, skew_s=3600.0)
    assert ask(engines["debian"], "select unix_time from time", at(host, NOW)) == [{"unix_time": str(int(NOW) + 3600)}]
    for sql in EVERYWHERE[:10]:
        assert ask(engines["debian"], sql, at(host, NOW)) == []


def test_a_hostname_of_ones_own(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    host = profiles["debian"].host(seed=1, hostname="db-primary")
    assert host.identity.hostname == "db-primary"
    assert ask(engines["debian"], "select hostname from system_info", at(host, NOW)) == [{"hostname": "db-primary"}]


# -- cost --------------------------------------------------------------------------------------------------------


def test_a_waiting_host_is_small(profiles: dict[str, Profile], engines: dict[str, Engine]) -> None:
    """Less than 10 kB, after queries have run over it."""
    clock = lambda: NOW  # noqa: E731
    ask(engines["ubuntu"], "select * from processes", profiles["ubuntu"].host(seed=1, index=5000).tables(clock))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        hosts = [profiles["ubuntu"].host(seed=1, index=index) for index in range(200)]
        tables = [host.tables(clock) for host in hosts]
        for each in tables[:20]:
            ask(engines["ubuntu"], "select p.pid, u.username from processes p join users u using (uid)", each)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown / len(hosts) < 2_000


@pytest.mark.parametrize("shape", SHAPES)
def test_one_pid_is_looked_up_without_the_others(
    shape: str, profiles: dict[str, Profile], engines: dict[str, Engine]
) -> None:
    tables = at(profiles[shape].host(seed=1, index=1), NOW)
    every = {row["pid"]: row for row in ask(engines[shape], "select * from processes", tables)}
    for pid, row in every.items():
        assert ask(engines[shape], f"select * from processes where pid = {pid}", tables) == [row]
    missing = [pid for pid in range(0, 3000, 7) if str(pid) not in every]
    for absent in (-1, 2**40, *missing[:60]):
        assert ask(engines[shape], f"select * from processes where pid = {absent}", tables) == []


# -- profiles of one's own ---------------------------------------------------------------------------------------


def test_a_profile_may_extend_a_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "extends: debian\nname: mine\nbase:\n  users: [{name: ops, uid: 700, gid: 700}]\n  groups: {ops: 700}\n"
        "  processes: [{name: thing, path: /opt/thing, user: ops, listens: ['tcp 0.0.0.0:7777']}]\n"
    )
    profile = load_profile(file)
    tables = at(profile.host(seed=1), NOW)
    sql = "select p.name, u.username from listening_ports l join processes p using (pid) join users u using (uid) "
    assert ask(Engine(schema=profile.schema), sql + "where port = 7777", tables) == [
        {"name": "thing", "username": "ops"}
    ]


BILLION_LAUGHS = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
BAD = [  # $ stands for what extends a shipped profile
    ("$base: {processes: [{name: a, user: nobody-here}]}", "unknown user 'nobody-here'"),
    ("$base: {processes: [{name: a, package: nope}]}", "package 'nope', which is not listed"),
    ("$base: {processes: [{name: a, listens: [tcp]}]}", "expected 'tcp HOST:PORT'"),
    ("$base: {processes: [{name: a, every_s: 10, lasts_s: [5, 20]}]}", "<= every_s (10)"),
    ("$base: {users: [{name: u, uid: 7, gid: 4711}]}", "has gid 4711, which no group has"),
    ("$base: {users: [{name: u, uid: 7, gid: 0, groups: [nope]}]}", "unknown group 'nope'"),
    ("$base: {tables: {nope: {columns: [a]}}}", "no table 'nope' on linux"),
    ("$base: {tables: {mounts: {columns: [a]}}}", "has no column a"),
    ("$base: {tables: {hash: {columns: [path], rows: [[a, b]]}}}", "1 values in a row, got 2"),
    ("$schema: {mine: [a NUMBER]}", "expected 'NAME TYPE', got 'a NUMBER'"),
    ("$kernel: {pid_step: 0}", "Expected `int` >= 1 - at `$.kernel.pid_step`"),
    ("$kernel: {pid_max: 310}", "pid_max: 310 is too low"),
    ("$kernel: {first_pid: 20}", "expected one below first_pid 20"),
    ("$base: {processes: [{name: a, pid: 1}]}", "two processes have pid 1"),
    (
        "$base: {processes: [{name: a, count: 1000, children: [{name: b, count: 1000}]}]}",
        "expected at most 4096 processes",
    ),
    ("$upgrade_days: [9, 5]", "upgrade_days: expected the lower number first, got 9, 5"),
    ("$network: {network: 10.0.0.0/99}", "expected an IPv4 network"),
    ("$network: {interface: {mac: 'no'}}", "`$.network.interface.mac`"),
    ("$reboot_days: 0", "`$.reboot_days`"),
    (BILLION_LAUGHS, "aliases counted each time"),
    ("a: " + "[" * 150 + "]" * 150, "at most 100 levels"),
    ("extends: debian\nname: 5", "Expected `str`, got `int` - at `$.name`"),
    ("extends: debian\nnmae: x", "unknown field `nmae`"),
    ("name: x", "missing required field"),
    ("extends: [1]", "expected the name of a profile in 'extends'"),
    ("- a", "expected a mapping at the top, got list"),
    ("a: [", "expected YAML"),
    ("extends: nope", "there is no host profile named 'nope'"),
    ("extends: ../x", "expected a profile's name"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_wrong_with_a_profile_is_said(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text.replace("$", "extends: debian\nname: x\n"))
    with pytest.raises(BadSetup) as caught:
        load_profile(file)
    assert message in str(caught.value)


def test_names_that_are_no_profiles(tmp_path: Path) -> None:
    for name in ("solaris", "no/such/file.yaml", str(tmp_path), ""):
        with pytest.raises(BadSetup) as caught:
            load_profile(name)
        assert caught.value.hint or "cannot read" in str(caught.value)
    loop = tmp_path / "loop.yaml"
    loop.write_text(f"extends: {loop}\n")
    with pytest.raises(BadSetup, match="in a circle"):
        load_profile(loop)


# -- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "table", "parts"),
    [
        ("1:8.9p1-3ubuntu0.13", "deb_packages", ("1:8.9p1-3ubuntu0.", 13, "")),
        ("8.7p1-45.el9", "rpm_packages", ("8.7p1-", 45, ".el9")),
        ("2.34-168.el9_6.14", "rpm_packages", ("2.34-", 168, ".el9_6.14")),
        ("137.0", "apps", ("137.", 0, "")),
        ("5", "apps", ("", 5, "")),
        ("", "apps", (".", 0, "")),
        ("git", "deb_packages", ("git.", 0, "")),
        ("1.2~rc", "deb_packages", ("1.", 2, "~rc")),
    ],
)
def test_the_number_that_an_upgrade_raises(version: str, table: str, parts: tuple[str, int, str]) -> None:
    assert split_version(version, table) == parts


def test_texts_are_filled_and_other_braces_stay() -> None:
    assert fill("{user}@{host} {x} {}", {"user": "ada", "host": "web"}) == "ada@web {x} {}"


@given(limit=st.integers(1, 10**9), what=st.text())
def test_dice_stay_in_their_bounds(limit: int, what: str) -> None:
    dice = Dice("seed", 1)
    assert 0 <= dice.below(limit, what) < limit
    assert 0 <= dice.share(what) < 1
    assert 2 <= dice.between((2, 5), what) < 5
    assert len(dice.hexadecimal(19, what)) == 19
    assert sorted(dice.sample(range(9), 9, what)) == list(range(9))


def test_dice_are_fair_enough() -> None:
    dice = Dice("seed")
    counts = [0] * 6
    for number in range(6000):
        counts[dice.below(6, "throw", number)] += 1
    assert max(counts) - min(counts) < 200
