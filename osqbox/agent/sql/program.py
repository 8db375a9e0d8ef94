"""Types of a result's columns, read from SQLite's program for the query (osquery/sql/sqlite_util.cpp)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_REGISTER_TYPES: Mapping[str, tuple[int, str]] = {
    "Integer": (2, "INTEGER"),
    "Int64": (2, "BIGINT"),
    "Real": (2, "DOUBLE"),
    **dict.fromkeys(("String", "String8"), (2, "TEXT")),
    "Concat": (3, "TEXT"),
    **dict.fromkeys(("AggStep", "AggStep1"), (3, "BIGINT")),
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Divide", "Remainder"), (3, "BIGINT")),
    **dict.fromkeys(("BitAnd", "BitOr", "ShiftLeft", "ShiftRight"), (3, "BIGINT")),
    **dict.fromkeys(("And", "Or"), (3, "INTEGER")),
}
"""Opcode -> which of its operands names the register it writes, and the type of what it writes there."""
_CASTS = {"A": "BLOB", "B": "TEXT", "C": "BIGINT", "D": "BIGINT", "E": "DOUBLE"}


def expression_types(program: Iterable[tuple[str, int, int, int]]) -> dict[int, str]:
    """Types of the columns of a result by position, as far as the program tells (sqlite_util.cpp, applyTypes)."""
    registers: dict[int, str] = {}
    found: dict[int, str] = {}
    for opcode, *operands in program:
        p1, p2, p3 = operands
        if opcode == "ResultRow":
            found |= {at: registers[p1 + at] for at in range(p2) if p1 + at in registers}
        elif opcode in ("Copy", "SCopy"):
            count = p3 + 1 if opcode == "Copy" else 1
            registers |= {p2 + at: registers[p1 + at] for at in range(count) if p1 + at in registers}
        elif opcode == "Cast":
            registers[p1] = _CASTS.get(chr(p2), "BLOB")
        elif opcode in _REGISTER_TYPES:
            operand, kind = _REGISTER_TYPES[opcode]
            registers[operands[operand - 1]] = kind
    return found
