"""What a publisher sends, in its three shapes, and whether it may be published. Pure.

{"agents": [UUID], "groups": [NAME], "all": true, "action": {"name", "version", "args"}}     the operator API's
{"command": NAME | {"name", "version", "args"}, "uuids": [UUID] | "all"}                     the spike's
{"commands": [{"target": {"type", "id"}, "action": {...}, "document_id", ...}]}              the agent's of 2024
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .errors import CommsError, bad_request
from .messages import Action, Json, KnownCommand

EXPIRY_DEFAULT_S = 24 * 3600.0
EXPIRY_MAX_S = 365 * 86400.0
TARGETS_MAX = 100_000
COMMANDS_MAX = 10_000
"""In one publication of the third shape."""
ARGS_BYTES = 64 * 1024
"""Of one action's arguments as JSON; a stream holds a page of commands in memory."""
WORD_MAX = 256
"""Characters of an id or a name."""
UNKNOWN_COMMAND = "unknown_command"

FETCH_CONFIG, SET_GROUP = "fetch-config", "set-group"
"""Published by the box itself when a configuration or an agent's groups have changed."""
SEEDED = (
    KnownCommand(name=FETCH_CONFIG, description="fetch the configuration of your groups again"),
    KnownCommand(name="restart", description="restart yourself"),
    KnownCommand(name=SET_GROUP, description="your groups from now on", required_args=("groups",)),
    KnownCommand(name="upgrade", description="fetch an upgrade file and install it", required_args=("file_name",)),
)
"""The commands a new box knows."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One action for some agents."""

    action: Action
    agents: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    everyone: bool = False
    document_id: str = ""
    """Wanted by the publisher; only for a single agent."""
    request_id: str = ""
    """Empty: that of the publication."""
    source: str = "Users/Services"
    user: str = ""
    expires_in_s: float = EXPIRY_DEFAULT_S

    @property
    def target(self) -> tuple[str, str]:
        """Type and id of what was named."""
        if self.everyone:
            return "all", ""
        return ("group", ",".join(self.groups)) if self.groups else ("agent", "")


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """What is published together: all of it or nothing."""

    orders: tuple[Order, ...]
    is_g1: bool = False
    """In the third shape, which is answered in kind."""


def read_publication(body: bytes) -> Publication:
    """Any of the three shapes. Raises CommsError 400."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"body: expected JSON: {error}") from None
    except RecursionError:
        raise bad_request("body: expected JSON nested less deep") from None
    return parse_publication(found)


def parse_publication(found_untrusted: Json) -> Publication:
    found = _object(found_untrusted, "body")
    if "commands" in found:
        _only(found, {"commands"}, "body")
        commands = _list(found["commands"], "commands", COMMANDS_MAX)
        orders = tuple(_g1_order(each, f"commands[{n}]") for n, each in enumerate(commands))
        return Publication(orders=orders, is_g1=True)
    if "action" in found:
        return Publication(orders=(_operator_order(found),))
    if "command" in found:
        return Publication(orders=(_spike_order(found),))
    raise bad_request(f"body: expected a member action, command or commands, got {_names(found)}")


def check_known(action: Action, known: Sequence[KnownCommand]) -> None:
    """Raises CommsError 400 naming the known ones."""
    by_name = {each.name: each for each in known}
    found = by_name.get(action.name)
    if found is None:
        names = ", ".join(sorted(by_name)) or "none is known"
        raise bad_request(f"command: expected one of {names}; got {action.name!r}", reason=UNKNOWN_COMMAND)
    if found.version and action.version != found.version:
        raise bad_request(
            f"command {action.name}: expected version {found.version!r}, got {action.version!r}", reason=UNKNOWN_COMMAND
        )
    if missing := [name for name in found.required_args if name not in action.args]:
        raise bad_request(f"command {action.name}: expected args with {', '.join(missing)}, got {_names(action.args)}")


# the three shapes


OPTIONS = frozenset(("timeout", "expires_in", "request_id", "source", "user"))


def _operator_order(found: Mapping[str, Json]) -> Order:
    _only(found, {"agents", "groups", "all", "action"} | OPTIONS, "body")
    everyone = found.get("all", False)
    if not isinstance(everyone, bool):
        raise _expected("all", "true or false", everyone)
    agents, groups = _words(found.get("agents"), "agents"), _words(found.get("groups"), "groups")
    return _order(found, _action(found["action"], "action"), agents, groups, everyone)


def _spike_order(found: Mapping[str, Json]) -> Order:
    _only(found, {"command", "args", "uuids", "UUIDs", "uuid", "UUID"} | OPTIONS, "body")
    named = [name for name in ("uuids", "UUIDs", "uuid", "UUID") if name in found]
    if len(named) != 1:
        raise bad_request(f'body: expected uuids, a list or "all", got {_names(found)}')
    uuids = found[named[0]]
    command = found["command"]
    if isinstance(command, str):
        command = {"name": command, "args": found.get("args", {})}
    elif "args" in found:
        raise bad_request("args: expected them inside of command, got both apart")
    if uuids == "all":
        return _order(found, _action(command, "command"), (), (), True)
    uuids = [uuids] if isinstance(uuids, str) else uuids
    return _order(found, _action(command, "command"), _words(uuids, named[0]), (), False)


G1_MEMBERS = OPTIONS | {"document_id", "order_id", "target", "action", "status", "result"}


def _g1_order(found_untrusted: Json, where: str) -> Order:
    found = _object(found_untrusted, where)
    _only(found, G1_MEMBERS, where)
    target = _object(found.get("target"), f"{where}.target")
    kind, named = target.get("type"), (word(target.get("id"), f"{where}.target.id"),)
    if kind not in ("agent", "group"):
        raise _expected(f"{where}.target.type", "agent or group", kind)
    order = _order(
        found,
        _action(found.get("action"), f"{where}.action"),
        named if kind == "agent" else (),
        named if kind == "group" else (),
        False,
        where=f"{where}.",
    )
    document_id = found.get("document_id")
    if document_id in (None, "") or kind == "group":
        return order
    return msgspec.structs.replace(order, document_id=word(document_id, f"{where}.document_id"))


def _order(
    found: Mapping[str, Json],
    action: Action,
    agents: tuple[str, ...],
    groups: tuple[str, ...],
    everyone: bool,
    *,
    where: str = "",
) -> Order:
    if not (agents or groups or everyone):
        raise bad_request("body: expected agents, groups or all: true, got nobody to tell")
    given = {
        name: word(found[name], f"{where}{name}")
        for name in ("request_id", "source", "user")
        if found.get(name) not in (None, "")
    }
    return Order(
        action=action, agents=agents, groups=groups, everyone=everyone, expires_in_s=_expiry(found, where), **given
    )


def _expiry(found: Mapping[str, Json], where: str) -> float:
    """``expires_in`` before ``timeout``; 0 and null are the default, as in the messages of 2024."""
    for name in ("expires_in", "timeout"):
        value = found.get(name)
        if value in (None, 0):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= EXPIRY_MAX_S:
            raise _expected(f"{where}{name}", f"seconds, at most {EXPIRY_MAX_S:.0f}", value)
        return float(value)
    return EXPIRY_DEFAULT_S


def _action(found_untrusted: Json, where: str) -> Action:
    found = _object(found_untrusted, where)
    _only(found, {"name", "version", "args"}, where)
    version, args = found.get("version"), found.get("args")
    args = {} if args is None else _object(args, f"{where}.args")
    if (size_bytes := len(msgspec.json.encode(args))) > ARGS_BYTES:
        raise bad_request(f"{where}.args: expected at most {ARGS_BYTES} bytes, got {size_bytes}")
    return Action(
        name=word(found.get("name"), f"{where}.name"),
        version="" if version in (None, "") else word(version, f"{where}.version"),
        args=args,
    )


# what JSON must be


def _object(value: Json, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _expected(where, "an object", value)
    return value


def _list(value: Json, where: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise _expected(where, "a list", value)
    if not 0 < len(value) <= most:
        raise bad_request(f"{where}: expected 1 to {most:,} entries, got {len(value):,}")
    return value


def _words(value: Json, where: str) -> tuple[str, ...]:
    """Each once, in order; nothing given is nobody."""
    if value is None or value == []:
        return ()
    return tuple(dict.fromkeys(word(each, f"{where}[{n}]") for n, each in enumerate(_list(value, where, TARGETS_MAX))))


def word(value: Json, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= WORD_MAX or not value.isprintable():
        raise _expected(where, f"a text of 1 to {WORD_MAX} printable characters", value)
    return value


def _only(found: Mapping[str, Json], allowed: set[str] | frozenset[str], where: str) -> None:
    if unknown := sorted(found.keys() - allowed):
        raise bad_request(f"{where}: expected {', '.join(sorted(allowed))}, got {unknown[0][:40]!r}")


def _expected(where: str, what: str, got: Json) -> CommsError:
    return bad_request(f"{where}: expected {what}, got {_shown(got)}")


def _shown(value: Json) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _names(found: Mapping[str, Json]) -> str:
    return ", ".join(sorted(found)[:10])[:100] or "nothing"
