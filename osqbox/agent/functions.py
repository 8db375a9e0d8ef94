"""The SQL functions osquery adds to SQLite, as plain functions of plain values.

Behaviour follows osquery/sql/sqlite_{string,math,hashing,encoding,network,version}.cpp of osquery 5.23: NULL in
gives NULL out unless said otherwise, and a `SqlError` carries exactly the text the query fails with. Pure.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import ipaddress
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

SqlValue = None | int | float | str | bytes
Scalar = Callable[..., SqlValue]

REGEX_MAX_BYTES = 256  # --regex_max_size
REGEX_TIMEOUT_S = 2.0
"""For one call. A pattern may need exponential time; upstream's worker would be killed by its watchdog."""


class SqlError(Exception):
    """The query fails with this text."""


@dataclass(frozen=True, slots=True)
class Function:
    call: Scalar
    arguments: int
    """How many; -1 is any number."""


def text_of(value: SqlValue) -> str:
    """A value as SQLite casts it to text."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        return render_double(value)
    return str(value)


def number_of(value: SqlValue) -> float:
    """A value as SQLite casts it to a double: the longest numeric prefix, else 0."""
    if isinstance(value, (int, float)):
        return float(value)
    found = re.match(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", text_of(value))
    return float(found.group()) if found else 0.0


def render_double(value: float) -> str:
    """15 significant digits and always a point: ``1.0``, ``0.1``, ``1.0e+20``."""
    text = f"{value:.15g}"
    if "." in text or "n" in text:
        return text
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0{e}{exponent}"


def render(value: SqlValue) -> str:
    """A value as osqueryd renders it: NULL is empty, doubles keep a point, text ends at a NUL."""
    if isinstance(value, str):
        return value.partition("\0")[0] if "\0" in value else value
    if value is None:
        return ""
    if isinstance(value, float):
        return render_double(value)
    if isinstance(value, bytes):
        return value.partition(b"\0")[0].decode("utf-8", "replace")
    return str(int(value))


# -- strings ---------------------------------------------------------------------------------------------------


def split(text: SqlValue, tokens: SqlValue, index: SqlValue) -> SqlValue:
    """``split('a.b', '.', 1)`` is ``b``: any of the tokens separates, empty pieces vanish, pieces are trimmed."""
    if text is None or tokens is None or index is None:
        return None
    separators = text_of(tokens)
    if not separators:
        raise SqlError("Invalid input to split function")
    pieces = re.split(f"[{re.escape(separators)}]", text_of(text))
    return _nth([piece.strip() for piece in pieces if piece], index)


def regex_split(text: SqlValue, pattern: SqlValue, index: SqlValue) -> SqlValue:
    """``regex_split('192.168.0.1', '\\.0', 0)`` is ``192.168``."""
    if text is None or pattern is None or index is None:
        return None
    if not text_of(pattern):
        raise SqlError("Invalid input to split function")
    subject, pieces, start = text_of(text), [], 0
    compiled = _regex(pattern, too_big="Invalid regex")
    with _in_time():
        for found in compiled.finditer(subject, timeout=REGEX_TIMEOUT_S, concurrent=True):
            pieces.append(subject[start : found.start()])
            start = found.end()
    # std::sregex_token_iterator leaves out an empty last piece.
    if start < len(subject) or not pieces:
        pieces.append(subject[start:])
    return _nth(pieces, index)


def regex_match(text: SqlValue, pattern: SqlValue, index: SqlValue) -> SqlValue:
    """Group ``index`` of the first match anywhere in the text; 0 is the whole match; NULL without one."""
    if text is None or pattern is None or index is None:
        return None
    too_big = f"Invalid regex: too big, max size is {REGEX_MAX_BYTES} bytes"
    compiled = _regex(pattern, too_big=too_big)
    with _in_time():
        found = compiled.search(text_of(text), timeout=REGEX_TIMEOUT_S, concurrent=True)
    if found is None:
        return None
    return _nth([found.group() or "", *(group or "" for group in found.groups())], index)


def concat(*values: SqlValue) -> SqlValue:
    return "".join(text_of(value) for value in values if value is not None) if values else None


def concat_ws(*values: SqlValue) -> SqlValue:
    """The first value joins the others. NULLs are skipped; as upstream, one at the end leaves its separator."""
    if not values:
        raise SqlError("Missing separator to concat_ws")
    separator, *rest = values
    if not rest:
        return None
    glue, last = text_of(separator), len(rest) - 1
    kept = (text_of(v) + (glue if at < last else "") for at, v in enumerate(rest) if v is not None)
    return "".join(kept)


def inet_aton(address: SqlValue) -> SqlValue:
    """An IPv4 address as a number; NULL for anything else."""
    try:
        return int(ipaddress.IPv4Address(text_of(address)))
    except ValueError:
        return None


# -- commands and paths ----------------------------------------------------------------------------------------

IsFile = Callable[[str], bool]


def find_file_path_in_cmd(is_file: IsFile, *values: SqlValue) -> SqlValue:
    """``find_file_path_in_cmd(command[, allow_quoting[, escape]])``: the shortest start of it that is a file's path."""
    found = _file_path(is_file, values, shortest=True)
    if found is None:
        raise SqlError("Invalid inputs to find_binary_path_from_cmd")  # named so upstream
    return found


def is_path_deterministic(is_file: IsFile, *values: SqlValue) -> SqlValue:
    """1 when only one start of the command is a file's path, or none: nothing can be put in its way."""
    shortest, longest = (_file_path(is_file, values, shortest=short) for short in (True, False))
    if shortest is None or longest is None:
        raise SqlError("Invalid inputs to is_path_deterministic")
    return int(not shortest or len(shortest) == len(longest))


def parent_directory(path: SqlValue) -> SqlValue:
    """What stands before the last backslash, on Linux too: upstream has the two platforms' separators the wrong way."""
    if not isinstance(path, str):
        raise SqlError("Invalid inputs to parent_directory, TEXT was expected")
    parent, divider, _ = path.rpartition("\\")
    return parent if divider else None


def _file_path(is_file: IsFile, values: tuple[SqlValue, ...], *, shortest: bool) -> str | None:
    """sqlite_filesystem.cpp, findExistingProgramPathFromCommand; None for arguments it cannot use."""
    if not values or None in values:
        return None
    quoting = len(values) > 1 and number_of(values[1]) != 0
    escape = text_of(values[2]) if len(values) > 2 else "\\"
    if len(escape) != 1:
        return None
    path, found = "", ""
    is_quoted = is_escaped = False
    for letter in text_of(values[0]).lstrip():
        if is_escaped:
            path, is_escaped = path + letter, False
        elif quoting and letter == '"':
            is_quoted = not is_quoted
        elif letter == escape:
            is_escaped = True
        else:
            if not is_quoted and letter.isspace() and is_file(path):
                found = path
                if shortest:
                    return found
            path += letter
    return path if is_file(path) else found


def _regex(pattern: SqlValue, *, too_big: str) -> regex.Pattern[str]:
    """Matched by `regex`, which can be stopped and lets other threads run; `re` can do neither."""
    import regex

    source = text_of(pattern)
    if len(source.encode()) > REGEX_MAX_BYTES:
        raise SqlError(too_big)
    try:
        return regex.compile(source, regex.VERSION0)
    except (regex.error, OverflowError, RecursionError):
        raise SqlError("Invalid regex") from None


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise SqlError(f"Regex took longer than {REGEX_TIMEOUT_S:g} s") from None


def _nth(pieces: list[str], index: SqlValue) -> SqlValue:
    at = int(number_of(index))
    return pieces[at] if 0 <= at < len(pieces) else None


# -- hashes, encodings, networks ---------------------------------------------------------------------------------


def _digest(name: str) -> Scalar:
    def digest(value: SqlValue) -> SqlValue:
        if value is None:
            return None
        return hashlib.new(name, _c_string(value), usedforsecurity=False).hexdigest()

    return digest


def to_base64(value: SqlValue) -> SqlValue:
    return None if value is None else base64.b64encode(_c_string(value)).decode()


def from_base64(value: SqlValue) -> SqlValue:
    """The decoded text; empty when the input is not base64."""
    if value is None:
        return None
    try:
        decoded = base64.b64decode(_c_string(value), validate=True)
    except binascii.Error:
        return ""
    return decoded.decode("utf-8", "replace")


def conditional_to_base64(value: SqlValue) -> SqlValue:
    """Base64 only for text with bytes outside printable ASCII."""
    if value is None:
        return None
    raw = _c_string(value)
    return text_of(value) if all(0x20 <= byte < 0x7F for byte in raw) else to_base64(value)


def in_cidr_block(cidr: SqlValue, address: SqlValue) -> SqlValue:
    """1 when the address is a host of the block, else 0. Both must be text."""
    if not isinstance(cidr, str):
        raise SqlError("CIDR must be a string")
    if not isinstance(address, str):
        raise SqlError("IP addresss must be a string")  # spelled so upstream
    try:
        host = ipaddress.ip_address(address)
    except ValueError:
        raise SqlError("IP address cannot be parsed") from None
    try:
        if isinstance(host, ipaddress.IPv6Address):
            return int(host in ipaddress.IPv6Network(cidr, strict=False))
        network = ipaddress.IPv4Network(cidr, strict=False)
    except ValueError:
        raise SqlError(f"CIDR for IP address v{host.version} cannot be parsed") from None
    # As Boost's network_v4::hosts(), upstream's test: the network and broadcast addresses are not hosts.
    if network.prefixlen == 32:
        return int(host == network.network_address)
    return int(network.network_address < host < network.broadcast_address)


def community_id_v1_strict(*values: SqlValue) -> SqlValue:
    """Corelight's community id of ``saddr, daddr, sport, dport, protocol[, seed]``."""
    source, target, source_port, target_port, protocol = values[:5]
    seed = values[5] if len(values) > 5 else 0
    if not isinstance(seed, int):
        raise SqlError("Community ID seed must be an integer")
    if not -0x8000 <= seed <= 0x7FFF:
        raise SqlError("Community ID seed must fit in 2 bytes")
    if not isinstance(source, str) or not isinstance(target, str):
        raise SqlError("Community ID IPs must be strings")
    ends = [_address(source, "saddr"), _address(target, "daddr")]
    if not isinstance(source_port, int) or not isinstance(target_port, int):
        raise SqlError("Community ID ports must be integers")
    if not (0 <= source_port <= 0xFFFF and 0 <= target_port <= 0xFFFF):
        raise SqlError("Community ID ports must fit in 2 bytes")
    if not isinstance(protocol, int):
        raise SqlError("Community ID protocol must be an integer")
    if not 0 <= protocol <= 0xFF:
        raise SqlError("Community ID protocol must fit in 1 byte")
    low, high = sorted(zip(ends, (source_port, target_port), strict=True), key=lambda e: (len(e[0]), *e))
    packed = struct.pack(">h", seed) + low[0] + high[0] + bytes([protocol, 0])
    packed += struct.pack(">HH", low[1], high[1])
    return "1:" + base64.b64encode(hashlib.sha1(packed, usedforsecurity=False).digest()).decode()


def community_id_v1(*values: SqlValue) -> SqlValue:
    """As `community_id_v1_strict`, but NULL for values it cannot use."""
    try:
        return community_id_v1_strict(*values)
    except SqlError:
        return None


def _address(text: str, which: str) -> bytes:
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        raise SqlError(f"Community ID {which} cannot be parsed as IP") from None


def _c_string(value: SqlValue) -> bytes:
    """The bytes osquery sees: it reads text values up to the first NUL."""
    raw = value if isinstance(value, bytes) else text_of(value).encode("utf-8", "replace")
    return raw.partition(b"\0")[0]


# -- numbers -----------------------------------------------------------------------------------------------------


def _double(compute: Callable[[float], float]) -> Scalar:
    def call(value: SqlValue) -> SqlValue:
        if value is None:
            return None
        try:
            return compute(number_of(value))
        except ValueError:
            raise SqlError("Numerical argument out of domain") from None
        except (OverflowError, ZeroDivisionError):
            raise SqlError("Numerical result out of range") from None

    return call


def _whole(compute: Callable[[float], int]) -> Scalar:
    def call(value: SqlValue) -> SqlValue:
        if value is None or isinstance(value, int):
            return value
        try:
            return max(-(2**63), min(2**63 - 1, compute(number_of(value))))
        except (OverflowError, ValueError):
            raise SqlError("Numerical result out of range") from None

    return call


def power(base: SqlValue, exponent: SqlValue) -> SqlValue:
    if base is None or exponent is None:
        return None
    try:
        return math.pow(number_of(base), number_of(exponent))
    except ValueError:
        raise SqlError("Numerical argument out of domain") from None
    except OverflowError:
        raise SqlError("Numerical result out of range") from None


# -- versions ----------------------------------------------------------------------------------------------------

_PRECEDENCE: Mapping[str, int] = {"~": 1, "-": 2, "^": 3, ".": 4, ":": 5}


@dataclass(frozen=True, slots=True)
class VersionRules:
    """How a packaging system orders versions (sqlite_version.cpp)."""

    epoch: bool = False
    delimiters: bool = False
    remainder: bool = False
    remainder_precedence: bool = False


COLLATIONS: Mapping[str, VersionRules] = {
    "version": VersionRules(),
    "version_arch": VersionRules(epoch=True, remainder=True, remainder_precedence=True),
    "version_dpkg": VersionRules(epoch=True, delimiters=True),
    "version_rhel": VersionRules(epoch=True, delimiters=True, remainder=True),
}


def compare_versions(left: str, right: str, rules: VersionRules = VersionRules()) -> int:
    """Negative, 0 or positive, as left is below, equal to or above right."""
    if left == right:
        return 0
    if not left or not right:
        return 1 if left else -1
    if rules.epoch and (order := _compare_epoch(left, right)):
        return order
    first = 0
    for a, b in zip(left, right, strict=False):
        a_rank, b_rank = _PRECEDENCE.get(a, 0), _PRECEDENCE.get(b, 0)
        if not a_rank and not b_rank:
            first = first or ord(a) - ord(b)
        elif not a_rank or not b_rank:
            return 1 if not a_rank else -1
        elif first:
            return first
        elif rules.delimiters and a_rank != b_rank:
            return a_rank - b_rank
    if len(left) == len(right):
        return first
    return _compare_remainder(left, right, first, rules)


def _compare_epoch(left: str, right: str) -> int:
    if ":" in left and ":" in right:
        return left.index(":") - right.index(":")
    return (":" in left) - (":" in right)


def _compare_remainder(left: str, right: str, first: int, rules: VersionRules) -> int:
    if rules.remainder:
        longer, sign = (right, -1) if len(left) < len(right) else (left, 1)
        shorter = left if longer is right else right
        following = longer[len(shorter)]
        if following in "~-^":
            return sign * {"~": -1, "-": 0, "^": 1}[following]
        if first and not (rules.remainder_precedence and shorter[-1].isdigit()):
            return first
    return len(left) - len(right)


def version_compare(*values: SqlValue) -> SqlValue:
    """``version_compare('1.2', '<', '1.10'[, epoch, delim_precedence, comp_remaining, remainder_precedence])``."""
    if len(values) < 3 or not all(isinstance(value, str) for value in values[:3]):
        raise SqlError("Must provide two version strings and an operator to compare.")
    left, operator, right = (text_of(value) for value in values[:3])
    if operator not in ("<", "<=", "=", ">=", ">"):
        raise SqlError("Unknown compare operator. Must provide one of the following: (<, <=, =, >=, >)")
    if not all(value is None or isinstance(value, int) for value in values[3:7]):
        raise SqlError(
            "Options for epoch, delim_precedence, comp_remaining, and remainder_precedence "
            "must be true, false, or null."
        )
    order = compare_versions(left, right, VersionRules(*(bool(value) for value in values[3:7])))
    if order == 0:
        return int("=" in operator)
    return int(operator[0] == ("<" if order < 0 else ">"))


# -- the list ----------------------------------------------------------------------------------------------------


def functions() -> Mapping[tuple[str, int], Function]:
    """Every added function by name and number of arguments."""
    one: dict[str, Scalar] = {
        "inet_aton": inet_aton,
        "md5": _digest("md5"),
        "sha1": _digest("sha1"),
        "sha256": _digest("sha256"),
        "to_base64": to_base64,
        "from_base64": from_base64,
        "conditional_to_base64": conditional_to_base64,
        "sqrt": _double(math.sqrt),
        "exp": _double(math.exp),
        "log": _double(math.log),
        "ln": _double(math.log),
        "log10": _double(math.log10),
        "sin": _double(math.sin),
        "cos": _double(math.cos),
        "tan": _double(math.tan),
        "cot": _double(lambda x: 1.0 / math.tan(x)),
        "asin": _double(math.asin),
        "acos": _double(math.acos),
        "atan": _double(math.atan),
        "degrees": _double(math.degrees),
        "radians": _double(math.radians),
        "ceil": _whole(math.ceil),
        "ceiling": _whole(math.ceil),
        "floor": _whole(math.floor),
    }
    several: dict[tuple[str, int], Scalar] = {
        ("pi", 0): lambda: math.pi,
        ("power", 2): power,
        ("in_cidr_block", 2): in_cidr_block,
        ("split", 3): split,
        ("regex_split", 3): regex_split,
        ("regex_match", 3): regex_match,
        ("community_id_v1", 5): community_id_v1,
        ("community_id_v1", 6): community_id_v1,
        ("community_id_v1_strict", 5): community_id_v1_strict,
        ("community_id_v1_strict", 6): community_id_v1_strict,
        ("concat", -1): concat,
        ("concat_ws", -1): concat_ws,
        ("version_compare", -1): version_compare,
        ("parent_directory", 1): parent_directory,
    }
    several.update({(name, 1): call for name, call in one.items()})
    return {(name, count): Function(call, count) for (name, count), call in several.items()}
