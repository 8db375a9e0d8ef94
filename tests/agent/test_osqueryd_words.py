"""osqueryd's command line: every spelling gflags knows, flag files, and its errors; and the shell's output formats."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.agent.flags import Flags
from osqbox.agent.osqueryd.commandline import DEFAULT_FLAGFILE, CommandLine, accepted_flags, help_text, parse
from osqbox.agent.osqueryd.hosts import Choice, HostClock
from osqbox.agent.osqueryd.printing import Style, shown
from osqbox.errors import BadUsage


def read_line(*words: str, files: dict[str, str] | None = None, environ: dict[str, str] | None = None) -> CommandLine:
    def read(path: str) -> str:
        try:
            return (files or {})[path]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory") from None

    return parse(words, read=read, environ=environ or {})


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--host_identifier=uuid"], "host_identifier", "uuid"),
        (["--host_identifier", "uuid"], "host_identifier", "uuid"),
        (["-host_identifier=uuid"], "host_identifier", "uuid"),
        (["-verbose"], "verbose", "true"),
        (["--verbose=1"], "verbose", "true"),
        (["--verbose=F"], "verbose", "false"),
        (["--verbose", "--noverbose"], "verbose", "false"),
        (["--extensions_interval", "-1"], "extensions_interval", "-1"),
        (["--separator="], "separator", ""),
        (["--config_path=a=b"], "config_path", "a=b"),
        (["--config_tls_refresh=9"], "config_refresh", "9"),
        (["--database_path=a", "--database_path=b"], "database_path", "b"),
        (["--alsologtostderr"], "alsologtostderr", "true"),
    ],
)
def test_every_spelling_of_a_flag(words: list[str], name: str, value: str) -> None:
    line = read_line(*words)
    assert (line.errors, line.words, line.text(name)) == ((), (), value)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--bogus"], "ERROR: unknown command line flag 'bogus'"),
        (["-nobogus=1"], "ERROR: unknown command line flag 'nobogus'"),
        (["--tls_allow_unsafe"], "ERROR: unknown command line flag 'tls_allow_unsafe'"),
        (["--verbose=maybe"], "ERROR: illegal value 'maybe' specified for bool flag 'verbose'"),
        (["--config_refresh=-1"], "ERROR: illegal value '-1' specified for uint64 flag 'config_refresh'"),
        (["--config_refresh=soon"], "ERROR: illegal value 'soon' specified for uint64 flag 'config_refresh'"),
        (["--config_path"], "ERROR: flag '--config_path' is missing its argument"),
        (["--noconfig_path"], "ERROR: boolean value (noconfig_path) specified for string command line flag"),
        (["--flagfile=gone"], "gone: No such file or directory"),
        (["--fromenv=verbose"], "ERROR: FLAGS_verbose not found in environment"),
    ],
)
def test_what_is_wrong_is_said_in_gflags_words(words: list[str], error: str) -> None:
    assert read_line(*words).errors == (error,)


def test_all_errors_are_told_at_once_in_the_order_of_their_flags() -> None:
    errors = read_line("--zoo", "--verbose=x", "--ant").errors
    assert [error.split("'")[1] for error in errors] == ["ant", "x", "zoo"]


def test_undefok_forgives_an_unknown_flag() -> None:
    assert read_line("--undefok=bogus,other", "--bogus", "--noother").errors == ()


def test_words_that_are_no_flags_keep_their_order_and_a_double_dash_ends_flags() -> None:
    line = read_line("select 1", "--json", "-", "--", "--verbose", "x")
    assert line.words == ("select 1", "-", "--verbose", "x")
    assert line.true("json")
    assert not line.true("verbose")


FILE = """
# a comment
  # another
--host_identifier=uuid
  --verbose
--nodisable_events
--config_path = /blank
--config_refresh 5
--bogus=1
--logger_plugin=tls\r
"""


def test_a_flag_file_is_read_line_by_line_and_its_mistakes_are_passed_over() -> None:
    """As gflags does: no quoting, one `name=value` each; what cannot be read is ignored."""
    line = read_line("--flagfile=f", files={"f": FILE})
    assert line.errors == ()
    assert line.text("host_identifier") == "uuid"
    assert line.true("verbose")
    assert not line.true("disable_events")
    assert line.text("logger_plugin") == "tls"
    assert not line.is_given("config_refresh")
    assert line.ignored == ("--config_path = /blank", "--config_refresh 5", "--bogus=1")


def test_a_bad_value_in_a_flag_file_is_an_error() -> None:
    assert read_line("--flagfile=f", files={"f": "--verbose=perhaps\n"}).errors != ()


def test_what_follows_a_flag_file_wins_and_what_precedes_it_loses() -> None:
    files = {"f": "--config_refresh=5\n--logger_tls_period=5\n"}
    line = read_line("--config_refresh=1", "--flagfile", "f", "--logger_tls_period=9", files=files)
    assert (line.integer("config_refresh"), line.integer("logger_tls_period")) == (5, 9)


def test_a_line_without_a_dash_names_the_programs_meant_below() -> None:
    text = "osqueryi\n--config_refresh=1\nother\nosquery*\n--logger_tls_period=7\n"
    line = read_line("--flagfile=f", files={"f": text})
    assert not line.is_given("config_refresh")
    assert line.integer("logger_tls_period") == 7


def test_flag_files_that_name_each_other_end() -> None:
    assert "name each other" in read_line("--flagfile=f", files={"f": "--flagfile=f\n"}).errors[0]


def test_the_default_flag_file_counts_when_none_is_named() -> None:
    files = {DEFAULT_FLAGFILE: "--config_refresh=4\n", "f": ""}
    assert read_line(files=files).integer("config_refresh") == 4
    assert not read_line("--flagfile=f", files=files).is_given("config_refresh")


def test_flags_come_from_the_environment_when_asked() -> None:
    environ = {"FLAGS_verbose": "true", "FLAGS_config_refresh": "3"}
    line = read_line("--fromenv=verbose", "--tryfromenv=config_refresh,hash_delay", environ=environ)
    assert (line.errors, line.true("verbose"), line.integer("config_refresh")) == ((), True, 3)


FLEET_ORBIT = """--pidfile=/o/osquery.pid --database_path=/o/osquery.db --extensions_socket=/o/orbit-osquery.em
--logger_path=/o/osquery_log --enroll_secret_env ENROLL_SECRET --host_identifier=uuid --tls_hostname=localhost:8080
--enroll_tls_endpoint=/api/v1/osquery/enroll --config_plugin=tls --config_tls_endpoint=/api/v1/osquery/config
--config_refresh=60 --disable_distributed=false --distributed_plugin=tls --distributed_tls_max_attempts=10
--distributed_tls_read_endpoint=/api/v1/osquery/distributed/read
--distributed_tls_write_endpoint=/api/v1/osquery/distributed/write --logger_plugin=tls,filesystem
--logger_tls_endpoint=/api/v1/osquery/log --disable_carver=false --carver_start_endpoint=/api/v1/osquery/carve/begin
--carver_continue_endpoint=/api/v1/osquery/carve/block --carver_block_size=2000000
--tls_server_certs /o/fleet.pem --force --database_path=/o/osquery.db --flagfile=/o/osquery.flags"""

LAUNCHER = """--logger_plugin=kolide_grpc --distributed_plugin=kolide_grpc --disable_distributed=false
--distributed_interval=5 --pack_delimiter=: --host_identifier=uuid --force=true --utc --tls_server_certs=/l/certs.pem
--config_refresh=300 --config_accelerated_refresh=30 --disable_extensions=false --extensions_timeout=20
--disable_watchdog --distributed_denylist_duration=0 --verbose --augeas_lenses=/l/lenses --pidfile=/l/osquery-1.pid
--database_path=/l/osquery.db --extensions_socket=/l/osquery-1.sock --extensions_require=kolide_grpc
--config_plugin=kolide_grpc"""

PYTHON_PACKAGE = """--extensions_socket /tmp/pyosqsock --disable_database --disable_watchdog --disable_logging
--ephemeral --config_path /dev/null"""


@pytest.mark.parametrize("words", [FLEET_ORBIT, LAUNCHER, PYTHON_PACKAGE])
def test_the_managers_that_are_out_there_are_understood(words: str) -> None:
    line = read_line(*words.split(), files={"/o/osquery.flags": ""})
    assert (line.errors, line.words) == ((), ())
    Flags(line.osquery_flags)


def test_every_flag_with_a_default_has_one_it_would_accept() -> None:
    bad = [f.name for f in accepted_flags().values() if f.type and not f.alias_of and not f.accepts(f.default)]
    assert [name for name in bad if not name.startswith("etw_")] == []


@given(st.lists(st.text(max_size=20), max_size=6))
def test_no_words_make_it_fail(words: list[str]) -> None:
    line = read_line(*words)
    assert all(isinstance(word, str) for word in line.words)


def test_help_names_the_flags_and_the_shell_its_own() -> None:
    assert "--database_path VALUE" in help_text(shell=False)
    assert "--json_pretty" not in help_text(shell=False)
    assert "--json_pretty" in help_text(shell=True)


# -- the host --------------------------------------------------------------------------------------------------------


def test_the_host_is_chosen_by_flag_before_variable() -> None:
    environ = {"OSQBOX_PROFILE": "rhel", "OSQBOX_SEED": "3", "OSQBOX_START_TIME": "2026-01-31T08:00:00Z"}
    choice = Choice.read(read_line("--osqbox_profile=ubuntu", "--osqbox_index=2"), environ)
    assert choice == Choice("ubuntu", 3, 2, 1769846400.0)


@pytest.mark.parametrize("words", ["--osqbox_start_time=soon"])
def test_a_start_time_that_is_none_is_explained(words: str) -> None:
    with pytest.raises(BadUsage, match="expected seconds since 1970"):
        Choice.read(read_line(words), {})


def test_a_seed_variable_that_is_no_number_is_explained() -> None:
    with pytest.raises(BadUsage, match="whole number for osqbox_seed, got 'x'"):
        Choice.read(read_line(), {"OSQBOX_SEED": "x"})


def test_the_hosts_clock_starts_where_it_is_told() -> None:
    import time

    assert 0 <= HostClock(1000.0, time.time()).now() - 1000.0 < 5


# -- the formats -----------------------------------------------------------------------------------------------------

ROWS = [{"name": "a b", "pid": "1"}, {"name": 'q"', "pid": ""}]
COLUMNS = ("pid", "name")

FORMATS = {
    "json": '[\n  {"name":"a b","pid":"1"},\n  {"name":"q\\"","pid":""}\n]\n',
    "pretty": '+-----+------+\n| pid | name |\n+-----+------+\n| 1   | a b  |\n|     | q"   |\n+-----+------+\n',
    "csv": 'pid,name\n1,"a b"\n"","q"""\n',
    "list": 'pid,name\n1,a b\n,q"\n',
    "line": '  pid = 1\n name = a b\n\n  pid = \n name = q"\n',
    "column": 'pid         name      \n----------  ----------\n1           a b       \n            q"        \n',
}


@pytest.mark.parametrize("mode", FORMATS)
def test_rows_look_as_osqueryi_prints_them(mode: str) -> None:
    assert shown(ROWS, COLUMNS, Style(mode, separator=",")) == FORMATS[mode]


def test_no_rows_are_an_empty_list_in_json_and_nothing_elsewhere() -> None:
    empty = {mode: shown([], COLUMNS, Style(mode)) for mode in (*FORMATS, "json_pretty")}
    assert empty.pop("json") == "[\n\n]\n"
    assert empty.pop("json_pretty") == "[]\n"
    assert set(empty.values()) == {""}


def test_a_header_can_be_left_out() -> None:
    assert shown(ROWS[:1], COLUMNS, Style("csv", header=False, separator=",")) == '1,"a b"\n'


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), st.text(), min_size=2, max_size=2), max_size=4))
def test_json_can_be_read_back(rows: list[dict[str, str]]) -> None:
    assert json.loads(shown(rows, ("a", "b"), Style("json"))) == rows
    assert json.loads(shown(rows, ("a", "b"), Style("json_pretty"))) == rows
