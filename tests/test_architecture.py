"""The laws of the house, read from the sources: who may import whom, and who knows no clock, loop or database."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SYSTEMS = {"osquery", "shells", "comms", "jobs", "forward", "agent", "faults", "cassette", "conform", "operator"}
WINDOW = "operator"
"""The operator API shows the other systems: it calls their plain rooms."""
WINDOW_FRAME = "operator/parts.py"
"""Names the live objects of other systems that the box hands to the operator API: the only file that may."""
SHELLS = {
    *("routes.py", "upkeep.py"),
    *("osquery/launcher.py", "osquery/presence.py"),
    *(
        f"jobs/{room}.py"
        for room in (
            "following",
            "front",
            "health",
            "keepers",
            "library",
            "live",
            "plain",
            "reflection",
            "rpc",
            "runner",
        )
    ),
    *(f"shells/{room}.py" for room in ("broker", "links", "session")),
    *(f"forward/{room}.py" for room in ("delivery", "forwarding", "http", "sinks")),
    *(
        f"comms/{room}.py"
        for room in (
            "engine",
            "front",
            "hashing",
            "hub",
            "intake",
            "login",
            "opensearch/client",
            "opensearch/journal",
            "publisher",
            "streams",
            "upgrades",
        )
    ),
}
"""The rooms of a server-side system that know the loop. Every other room there is plain functions."""
LOOSE_SYSTEMS = {"agent", "operator"}
"""These are shells but for the rooms that are pure."""

PURE = {
    *("exchange.py", "errors.py", "osquery/amalgamate.py"),
    *(
        f"agent/client/{room}.py"
        for room in (
            "__init__",
            "apply",
            "commands",
            "config",
            "core",
            "decorations",
            "denylist",
            "distributed",
            "enrollment",
            "forwarder",
            "performance",
            "results",
            "scheduler",
            "server",
            "state",
        )
    ),
}
PURE_NAMES = {"messages.py", "protocol.py"}
LOOP = {"trio", "quart", "quart_trio", "hypercorn", "trio_websocket", "asyncio", "anyio"}
WORLD = LOOP | {
    "time",
    "random",
    "secrets",
    "socket",
    "ssl",
    "sqlite3",
    "sqlite_utils",
    "apsw",
    "threading",
    "subprocess",
}
WORLD_CALLS = {
    "open", "os.urandom", "uuid.uuid1", "uuid.uuid4",
    "datetime.now", "datetime.utcnow", "datetime.today", "datetime.datetime.now", "dt.datetime.now",
}  # fmt: skip

OPENS_SQLITE = {"sqlite3.connect", "sqlite_utils.Database", "Database", "apsw.Connection"}
MAY_OPEN_SQLITE = {
    "store.py": OPENS_SQLITE,
    "agent/store.py": {"sqlite3.connect"},
    "agent/constructed.py": {"sqlite3.connect"},
}
IN_MEMORY = ":memory:"

BEHIND_THEIR_BACK = ("indexer.agents.add", "indexer.agents.change", "indexer.groups.put", "indexer.commands.publish")

MAY_IMPORT_BOX = {"cli", "testing", "__main__.py"}
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "Lock", "RLock", "local"}


@dataclass
class Module:
    path: str
    """Inside the package, such as ``osquery/routes.py``."""
    doc: str
    imports: list[tuple[int, str]] = field(default_factory=list)
    """Line and absolute dotted name; ``from a import b`` is ``a.b``."""
    calls: list[tuple[int, str, str]] = field(default_factory=list)
    """Line, what is called, and the first argument if it is a literal text."""
    state: list[tuple[int, str]] = field(default_factory=list)
    """Line and name of what is mutable and belongs to the module."""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def room(self) -> str:
        """The first folder, or the file at the top."""
        return self.path.split("/", 1)[0]

    @property
    def is_pure(self) -> bool:
        return self.path in PURE or self.name in PURE_NAMES or "Pure." in self.doc

    @property
    def is_plain(self) -> bool:
        if self.room in SYSTEMS - LOOSE_SYSTEMS:
            return not {self.name, self.path} & SHELLS
        return self.is_pure or self.path == "tenants.py" or self.name in {"service.py", "tables.py"}

    def at(self, line: int, what: str) -> str:
        return f"osqbox/{self.path}:{line}: {what}"


def read_module(root: Path, file: Path) -> Module:
    tree = ast.parse(file.read_bytes())
    module = Module(file.relative_to(root).as_posix(), ast.get_docstring(tree) or "")
    package = ["osqbox", *file.relative_to(root).parent.parts]
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                module.imports += [(node.lineno, alias.name) for alias in node.names]
            case ast.ImportFrom():
                start = package[: len(package) + 1 - node.level] if node.level else []
                origin = ".".join([*start, *([node.module] if node.module else [])])
                module.imports += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
            case ast.Call():
                called, first = dotted_name(node.func), text(node.args[0]) if node.args else ""
                module.calls.append((node.lineno, called, first))
                if called.endswith("import_module"):
                    module.imports.append((node.lineno, first))
            case ast.Global():
                module.state += [(node.lineno, name) for name in node.names]
    module.state += [(line, name) for line, name in module_names(tree) if name != "__all__" and name != name.upper()]
    return module


def dotted_name(expression: ast.expr) -> str:
    """``a.b.c``; empty for anything else."""
    match expression:
        case ast.Name(name):
            return name
        case ast.Attribute(value, name):
            return f"{dotted_name(value)}.{name}"
    return ""


def text(expression: ast.expr) -> str:
    return expression.value if isinstance(expression, ast.Constant) and isinstance(expression.value, str) else ""


def module_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names bound at the top of a module to something that can be changed in place."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and is_mutable(statement.value):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from ((statement.lineno, dotted_name(target)) for target in targets)


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return dotted_name(value.func).rsplit(".", 1)[-1] in MUTABLE_CALLS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def read_package(root: Path) -> list[Module]:
    return [read_module(root, file) for file in sorted(root.rglob("*.py"))]


def is_or_is_in(dotted: str, package: str) -> bool:
    return dotted == package or dotted.startswith(package + ".")


def systems_never_import_each_other(modules: list[Module]) -> Iterator[str]:
    plain = {(module.room, module.name.removesuffix(".py")) for module in modules if module.is_plain}
    for module in modules:
        for line, dotted in module.imports:
            origin, _, rest = dotted.removeprefix("osqbox.").partition(".")
            if not dotted.startswith("osqbox.") or module.room not in SYSTEMS or origin not in SYSTEMS - {module.room}:
                continue
            allowed = module.path == WINDOW_FRAME or (module.room == WINDOW and (origin, rest.split(".")[0]) in plain)
            if not allowed:
                yield module.at(
                    line, f"{module.room} imports {dotted}; events, settings or the box bring them together"
                )


def pure_files_know_no_world(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.is_pure:
            for line, dotted in module.imports:
                if dotted.split(".")[0] in WORLD:
                    yield module.at(line, f"a pure file imports {dotted}; take `now`, `new_id` or bytes as arguments")
            for line, called, _ in module.calls:
                if called in WORLD_CALLS:
                    yield module.at(line, f"a pure file calls {called}; take its result as an argument")


def plain_files_know_no_loop(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.is_plain:
            for line, dotted in module.imports:
                if dotted.split(".")[0] in LOOP:
                    yield module.at(line, f"{module.name} imports {dotted}; only shells know the loop")


def only_the_store_opens_sqlite(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for line, called, first in module.calls:
            if called in OPENS_SQLITE - MAY_OPEN_SQLITE.get(module.path, set()) and first != IN_MEMORY:
                yield module.at(line, f"{called} opens a database; store.py does that")


def nobody_imports_the_box(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for line, dotted in module.imports:
            if is_or_is_in(dotted, "osqbox.box") and module.room not in MAY_IMPORT_BOX:
                yield module.at(line, "imports the composition root; take the part you need as an argument")


def modules_hold_no_state(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for line, name in module.state:
            yield module.at(line, f"{name} is module-level state; keep it in an object that somebody owns")


def agents_are_told_of_their_changes(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.room in {WINDOW, "web"}:
            for line, called, _ in module.calls:
                if called.endswith(BEHIND_THEIR_BACK):
                    yield module.at(line, f"{called} tells no agent; `Comms` has a method that does")


Law = Callable[[list[Module]], Iterator[str]]
LAWS: list[Law] = [
    systems_never_import_each_other,
    pure_files_know_no_world,
    plain_files_know_no_loop,
    only_the_store_opens_sqlite,
    nobody_imports_the_box,
    modules_hold_no_state,
    agents_are_told_of_their_changes,
]


@cache
def house() -> list[Module]:
    return read_package(ROOT / "osqbox")


def test_the_house_was_found() -> None:
    assert {"box.py", "store.py", "osquery/messages.py", "agent/client/core.py"} <= {module.path for module in house()}


@pytest.mark.parametrize("law", LAWS)
def test_the_house_keeps_the_law(law: Law) -> None:
    assert list(law(house())) == []


def test_every_exception_names_a_file_that_is_there() -> None:
    assert PURE | set(MAY_OPEN_SQLITE) | {WINDOW_FRAME} <= {module.path for module in house()}
    assert {name for module in house() for name in (module.name, module.path)} >= SHELLS


OSQUERY_ROUTES = ("osquery/routes.py", "import trio")
OSQUERY_NODES = ("osquery/nodes.py", "")

BREACHES = [
    (systems_never_import_each_other, "osquery/nodes.py", "import osqbox.agent.client"),
    (systems_never_import_each_other, "osquery/nodes.py", "from osqbox import agent"),
    (systems_never_import_each_other, "osquery/deep/nodes.py", "from ...agent import client"),
    (systems_never_import_each_other, "osquery/__init__.py", "from ..agent.client import x"),
    (systems_never_import_each_other, "agent/client/core.py", "def f():\n from osqbox.osquery.nodes import x"),
    (systems_never_import_each_other, "agent/x.py", "import importlib\nimportlib.import_module('osqbox.shells')"),
    (systems_never_import_each_other, "operator/nodes.py", "from osqbox.osquery.routes import x"),
    (systems_never_import_each_other, "operator/nodes.py", "from osqbox import osquery"),
    (systems_never_import_each_other, "osquery/nodes.py", "from osqbox.operator import nodes"),
    (pure_files_know_no_world, "comms/messages.py", "import time"),
    (pure_files_know_no_world, "agent/client/core.py", "from trio import sleep"),
    (pure_files_know_no_world, "agent/schedule.py", '"""Schedules. Pure."""\nimport random'),
    (pure_files_know_no_world, "osquery/protocol.py", "import os\ndef f():\n return os.urandom(8)"),
    (plain_files_know_no_loop, "osquery/nodes.py", "import trio"),
    (plain_files_know_no_loop, "jobs/service.py", "def f():\n import quart.json"),
    (plain_files_know_no_loop, "operator/tables.py", "from hypercorn.config import Config"),
    (only_the_store_opens_sqlite, "osquery/nodes.py", "import sqlite3\nsqlite3.connect('x')"),
    (only_the_store_opens_sqlite, "cli/x.py", "from sqlite_utils import Database\nDatabase(path)"),
    (only_the_store_opens_sqlite, "agent/sql/connection.py", "import apsw\napsw.Connection(path)"),
    (nobody_imports_the_box, "listen/accept.py", "from .. import box"),
    (nobody_imports_the_box, "operator/app.py", "def f():\n from osqbox.box import Box"),
    (agents_are_told_of_their_changes, "web/x.py", "comms.indexer.agents.change(uuid)"),
    (agents_are_told_of_their_changes, "operator/x.py", "parts.served_comms().indexer.groups.put(name)"),
    (modules_hold_no_state, "feed.py", "subscribers = []"),
    (modules_hold_no_state, "feed.py", "_cache: dict[str, int] = {}"),
    (modules_hold_no_state, "feed.py", "import collections\nwaiting = collections.deque()"),
    (modules_hold_no_state, "feed.py", "def f():\n global total"),
]

ALLOWED = [
    ("operator/nodes.py", "from osqbox.osquery import nodes\nfrom osqbox.osquery.nodes import Node"),
    ("operator/parts.py", "from osqbox.osquery.routes import OsqueryApi"),
    ("osquery/campaigns.py", "from osqbox.osquery import nodes\nfrom . import routes\nimport osqbox.errors"),
    ("cli/serve.py", "import trio\nfrom osqbox.box import Box\nfrom osqbox.agent import client"),
    ("agent/sql/connection.py", "import time, apsw\napsw.Connection(':memory:')"),
    ("store.py", "import sqlite3\nsqlite3.connect('x')"),
    ("feed.py", "__all__ = ['a']\nNAMES = {'a': 1}\nkinds = ('a', 'b')\ndef f():\n here = []"),
]


def toy(root: Path, *files: tuple[str, str]) -> list[Module]:
    for path, source in files:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return read_package(root)


@pytest.mark.parametrize(("law", "path", "source"), BREACHES)
def test_a_breach_is_named_with_its_line(law: Law, path: str, source: str, tmp_path: Path) -> None:
    """It is always the last line of the example."""
    guilty = list(law(toy(tmp_path, OSQUERY_ROUTES, OSQUERY_NODES, (path, source))))
    assert [line.split(": ")[0] for line in guilty] == [f"osqbox/{path}:{len(source.splitlines())}"]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_the_laws_allow(path: str, source: str, tmp_path: Path) -> None:
    modules = toy(tmp_path, OSQUERY_ROUTES, OSQUERY_NODES, (path, source))
    assert [line for law in LAWS for line in law(modules)] == []
