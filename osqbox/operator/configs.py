"""Config sources: their versions, and what is wrong with them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import trio
from msgspec import UNSET, Meta, UnsetType
from quart import Blueprint
from quart_trio.wrappers import TrioResponse

from osqbox.errors import BadUsage
from osqbox.osquery import configs, structure
from osqbox.osquery.amalgamate import WRAPPER, Source, dotted, read_source

from .answers import Problem, Unacceptable, answered, read_answer
from .operations import Body, Query, operation
from .parts import Parts

NAME_MAX_CHARS = 200


class Target(Body):
    """Who gets a source: an empty kind asks nothing, kinds are joined by AND, words of a kind by OR."""

    tenants: list[str] | UnsetType = UNSET
    tags: list[str] | UnsetType = UNSET
    platforms: list[str] | UnsetType = UNSET
    nodes: list[str] | UnsetType = UNSET


class NewConfig(Body):
    """A source's next version. ``target`` and ``priority`` go before those in the content's ``osqbox`` member."""

    content: dict[str, Any]
    target: Target | UnsetType = UNSET
    priority: int | UnsetType = UNSET
    note: Annotated[str, Meta(max_length=1000)] = ""

    def document(self) -> dict[str, Any]:
        """The content as a file would have it, with what is said about it in its wrapper."""
        said: dict[str, Any] = {}
        if self.target is not UNSET:
            said["target"] = msgspec.to_builtins(self.target)
        if self.priority is not UNSET:
            said["priority"] = self.priority
        inside = self.content.get(WRAPPER, {})
        return {**self.content, WRAPPER: {**inside, **said}} if said and isinstance(inside, dict) else self.content


class Force(Query):
    force: Annotated[bool, Meta(description="Serve it even though its SQL has errors.")] = False


class Content(Body):
    """A config to look at."""

    content: dict[str, Any]


class Rollback(Body):
    """The version to serve again; the one before by default."""

    to: Annotated[int, Meta(ge=1)] | None = None


class ConfigSource(msgspec.Struct):
    """A source as it is served now."""

    name: str
    origin: str
    version: int
    target: dict[str, list[str]]
    priority: int
    note: str
    changed_at: str
    removed: bool


class ConfigVersion(ConfigSource):
    """A version of a source."""

    current: bool
    content: dict[str, Any] | None


class PutConfig(msgspec.Struct):
    """What was stored; equal content makes no new version."""

    name: str
    version: int
    problems: list[Problem]


class RolledBack(msgspec.Struct):
    """The newest version, which is equal to the older one."""

    name: str
    version: int


class Problems(msgspec.Struct):
    """What osquery would refuse, drop or not read."""

    problems: list[Problem]


class RemovedConfig(msgspec.Struct):
    """The source is served no more; its versions stay for a rollback."""

    deleted: str


def add(routes: Blueprint, parts: Parts) -> None:
    _add_reading(routes, parts)

    @routes.put("/configs/<name>")
    @operation(PutConfig, query=Force, body=NewConfig)
    async def put_config(name: str, query: Force, body: NewConfig) -> TrioResponse:
        """Check a config and make it the source's current version."""
        source = await trio.to_thread.run_sync(_source, name, body)
        problems = await _checked(source.content, skip_sql_errors=query.force)
        note = body.note or "put by the operator"
        version = await parts.store.write(lambda tx: configs.put(tx, source, note))
        return answered(PutConfig(name, version, problems))

    @routes.delete("/configs/<name>")
    @operation(RemovedConfig)
    async def remove_config(name: str) -> TrioResponse:
        """Stop serving a source."""
        await parts.store.write(lambda tx: configs.remove(tx, name))
        return answered(RemovedConfig(deleted=name))

    @routes.post("/configs/<name>/rollback")
    @operation(RolledBack, body=Rollback)
    async def roll_back_config(name: str, body: Rollback) -> TrioResponse:
        """Serve an older version of a source again."""
        return answered(RolledBack(name, await parts.store.write(lambda tx: configs.rollback(tx, name, body.to))))


def _add_reading(routes: Blueprint, parts: Parts) -> None:
    @routes.get("/configs")
    @operation(list[ConfigSource])
    async def list_configs() -> TrioResponse:
        """Every source, by name."""
        return await read_answer(parts.store, configs.listing)

    @routes.get("/configs/<name>")
    @operation(list[ConfigVersion])
    async def show_config(name: str) -> TrioResponse:
        """A source's kept versions with their content, the newest first."""
        return await read_answer(parts.store, lambda db: configs.versions(db, name))

    @routes.post("/configs/validate")
    @operation(Problems, body=Content)
    async def validate_config(body: Content) -> TrioResponse:
        """Check a config without storing it."""
        content = {key: value for key, value in body.content.items() if key != WRAPPER}
        structure, sql = await trio.to_thread.run_sync(_problems, content)
        return answered(Problems(structure + sql))


def _source(name: str, body: NewConfig) -> Source:
    if len(name) > NAME_MAX_CHARS or not name.isprintable():
        raise BadUsage(f"config name: expected at most {NAME_MAX_CHARS} printable characters, got {name[:40]!r}")
    return read_source(name, body.document())


async def _checked(content: Any, *, skip_sql_errors: bool) -> list[Problem]:
    """Its problems. Raises Unacceptable when one is an error that is not skipped."""
    shape, sql = await trio.to_thread.run_sync(_problems, content)
    fatal = shape if skip_sql_errors else shape + sql
    if any(problem.severity == "error" for problem in fatal):
        raise Unacceptable(shape + sql)
    return shape + sql


def _problems(content: Any) -> tuple[list[Problem], list[Problem]]:
    """Of its structure, and of its SQL."""
    from osqbox.osquery.sqlcheck import SqlChecker

    found = structure.check(content)
    # A structure too deep or too large to be served is not worth reading on.
    unreadable = any(problem.severity == "error" and not problem.path for problem in found)
    return _told(found), [] if unreadable else _told(SqlChecker().check_config(content))


def _told(problems: list[structure.Problem]) -> list[Problem]:
    return [Problem(dotted(each.path), each.severity, each.message) for each in problems]
