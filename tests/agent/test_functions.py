"""osquery's own SQL functions, against upstream's documented examples and test values."""

from __future__ import annotations

import itertools
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.agent import functions as f

ERRORS = [
    (lambda: f.split("a", "", 0), "Invalid input to split function"),
    (lambda: f.regex_match("a", "(", 0), "Invalid regex"),
    (lambda: f.regex_match("a", "a" * 257, 0), "Invalid regex: too big, max size is 256 bytes"),
    (lambda: f.in_cidr_block(1, "10.0.0.1"), "CIDR must be a string"),
    (lambda: f.in_cidr_block("10.0.0.0/8", "x"), "IP address cannot be parsed"),
    (lambda: f.in_cidr_block("10.0.0.0/99", "10.0.0.1"), "CIDR for IP address v4 cannot be parsed"),
    (lambda: f.version_compare("1"), "Must provide two version strings and an operator to compare."),
    (f.concat_ws, "Missing separator to concat_ws"),
]

VALUES = [
    (f.split("192.168.0.1", ".", 1), "168"),
    (f.split("192.168.0.1", ".0", 0), "192"),
    (f.split("a b", " ", 9), None),
    (f.split(None, ".", 0), None),
    (f.regex_split("192.168.0.1", r"\.", 1), "168"),
    (f.regex_split("192.168.0.1", r"\.0", 0), "192.168"),
    (f.regex_match("hello world. Goodbye", r"(\w+) \w+", 0), "hello world"),
    (f.regex_match("hello world. Goodbye", r"(\w+) \w+", 1), "hello"),
    (f.regex_match("hello", "x", 0), None),
    (f.regex_match("hello", "h", 5), None),
    (f.concat("a", None, 1, 2.0), "a12.0"),
    (f.concat_ws(",", "a", None, "b"), "a,b"),
    (f.concat_ws(None, "a", "b"), "ab"),
    (f.inet_aton("1.2.3.4"), 16909060),
    (f.inet_aton("::1"), None),
    (f.to_base64("a\0b"), "YQ=="),  # read as a C string
    (f.from_base64("aGVsbG8="), "hello"),
    (f.from_base64("%%"), ""),
    (f.conditional_to_base64("plain"), "plain"),
    (f.conditional_to_base64("caf\u00e9"), "Y2Fmw6k="),
    (f.in_cidr_block("198.51.100.0/24", "198.51.100.7"), 1),
    (f.in_cidr_block("198.51.100.0/24", "198.51.101.7"), 0),
    (f.in_cidr_block("198.51.100.0/24", "198.51.100.255"), 0),
    (f.in_cidr_block("198.51.100.7/32", "198.51.100.7"), 1),
    (f.in_cidr_block("2001:db8::/32", "2001:db8::1"), 1),
    (f.community_id_v1("128.232.110.120", "66.35.250.204", 34855, 80, 6), "1:LQU9qZlK+B5F3KDmev6m5PMibrg="),
    (f.community_id_v1("66.35.250.204", "128.232.110.120", 80, 34855, 6), "1:LQU9qZlK+B5F3KDmev6m5PMibrg="),
    (f.community_id_v1("128.232.110.120", "66.35.250.204", 34855, 80, 6, 1), "1:3V71V58M3Ksw/yuFALMcW0LAHvc="),
    (f.community_id_v1("x", "66.35.250.204", 34855, 80, 6), None),
    (f.version_compare("1.2", "<", "1.10"), 1),
    (f.version_compare("1.10", ">=", "1.10"), 1),
    (f.version_compare("10.0", ">", "9.0"), 1),
    (f.power(2, 10), 1024.0),
    (f.power(None, 10), None),
    (f.render_double(1.0), "1.0"),
    (f.render_double(1e20), "1.0e+20"),
    (f.render_double(1 / 3), "0.333333333333333"),
    (f.render(None), ""),
    (f.render(True), "1"),
    (f.render(b"bl\0ob"), "bl"),
    (f.number_of("12.5 apples"), 12.5),
    (f.number_of("apples"), 0.0),
]


@pytest.mark.parametrize(("actual", "expected"), VALUES)
def test_values(actual: f.SqlValue, expected: f.SqlValue) -> None:
    assert actual == expected
    assert type(actual) is type(expected)


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_carry_upstreams_words(call: object, message: str) -> None:
    with pytest.raises(f.SqlError) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value) == message


def test_md5_of_a_known_text() -> None:
    md5 = f.functions()["md5", 1].call
    assert md5("hello") == "5d41402abc4b2a76b9719d911017c592"
    assert md5(None) is None


def test_math_names_the_domain() -> None:
    root = f.functions()["sqrt", 1].call
    assert root(2) == math.sqrt(2)
    with pytest.raises(f.SqlError, match="out of domain"):
        root(-1)


versions = st.text(alphabet="0123456789abc.-~^:", max_size=12)


@given(versions, versions, st.sampled_from(sorted(f.COLLATIONS)))
def test_comparing_versions_is_antisymmetric_but_for_the_hyphen(left: str, right: str, collation: str) -> None:
    """Upstream calls a longer version equal when a hyphen follows; all else turns its sign with its sides."""
    rules = f.COLLATIONS[collation]
    one, other = f.compare_versions(left, right, rules), f.compare_versions(right, left, rules)
    assert (one > 0) == (other < 0)
    assert f.compare_versions(left, left, rules) == 0


@given(st.none() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary())
def test_rendering_never_fails_and_never_holds_a_nul(value: f.SqlValue) -> None:
    assert "\0" not in f.render(value)


# -- patterns that would never end -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [r"(x+x+)+y", r"(x|xx)+$", r"^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_catastrophic_pattern_fails_its_query_and_lets_other_threads_run(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osqbox.agent.functions.REGEX_TIMEOUT_S", 0.5)
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.01):
            ticks.append(time.monotonic())

    other = threading.Thread(target=tick)
    other.start()
    started = time.monotonic()
    try:
        with pytest.raises(f.SqlError, match=r"Regex took longer than 0\.5 s"):
            f.regex_match("x" * 5000 + "!", pattern, 0)
    finally:
        took = time.monotonic() - started
        over.set()
        other.join()
    assert took < 5
    gaps = [later - earlier for earlier, later in itertools.pairwise(ticks)]
    assert max(gaps, default=0) < 0.3, "the match held the interpreter"
