"""Every table a pretended host answers: by a function of the moment, by rows that stand in the profile, or by both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from osqbox.agent.profile import accounts, files, machine, network, programs, software
from osqbox.agent.profile.compiled import Compiled
from osqbox.agent.profile.description import Rows, fill
from osqbox.agent.profile.moment import Moment
from osqbox.agent.profile.software import PACKAGE_TABLES
from osqbox.agent.sql import Context, Row

Generate = Callable[[Moment, Context], Iterable[Row]]

_LINUX_ONLY = frozenset({"startup_items"})
"""Tables osquery has elsewhere too, with rows of another kind that nothing here makes."""
_FAMILIES = (machine, programs, network, accounts, software, files)
SOURCES: Mapping[str, tuple[Generate, frozenset[str]]] = {
    name: (generate, frozenset(pushdown))
    for family in _FAMILIES
    for name, (generate, *pushdown) in family.TABLES.items()
}


def names(compiled: Compiled) -> frozenset[str]:
    """The tables the hosts of a profile have a source for; osquery_info, which is the agent's, is not among them."""
    listed = {item.table for item in compiled.software}
    stand = {name for _, role in compiled.description.all_roles() for name in role.tables}
    absent = {"osquery_info"} | (PACKAGE_TABLES - listed)
    if compiled.description.platform != "linux":
        absent |= _LINUX_ONLY
    return frozenset(stand | {name for name in SOURCES if name in compiled.schema and name not in absent})


def lookup(name: str) -> tuple[Generate, frozenset[str]]:
    return SOURCES.get(name, (_nothing, frozenset()))


def _nothing(_moment: Moment, _context: Context) -> Iterable[Row]:
    return ()


def rows(name: str, moment: Callable[[], Moment], context: Context) -> Iterator[Row]:
    """A table's rows for one query."""
    here = moment()
    yield from lookup(name)[0](here, context)
    for role in here.roles.values():
        if name in role.tables:
            yield from _standing(here, role.tables[name])


def _standing(moment: Moment, table: Rows) -> Iterator[Row]:
    texts = moment.texts
    for values in table.rows:
        filled = (fill(value, texts) if isinstance(value, str) else value for value in values)
        yield dict(zip(table.columns, filled, strict=True))
