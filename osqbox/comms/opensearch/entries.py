"""What the journal's entries hold, and how a publication fits into one. Pure.

    seq of a command = number of its entry * NUMBERS + its position in the entry

so that numbers grow along the journal on every box, without a counter that somebody would have to own. They stay below
2^53, which every JSON reader keeps exactly, for 9,000 million entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from osqbox.comms.messages import Action, Change, Command, NewCommand

NUMBERS = 1_000_000
"""Commands in one entry at most."""
INLINE_COMMANDS = 500
"""A larger publication is kept in documents of its own, which are written before the entry that names them."""
PART_COMMANDS = 5_000

Row = tuple[str, str, int]
"""Of a command: its id, its agent, which of the templates it is made from."""


class Template(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the commands of a publication have in common."""

    tenant: str
    action: Action
    request_id: str
    source: str
    user: str
    target_type: str
    target_id: str
    created_at: float
    expires_at: float


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    templates: list[Template]
    rows: list[Row]
    parts: int = 0
    """How many documents hold the rows, if they are not here."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry is created or not created, as a whole: so is every publication in it."""

    id: str
    """By which its author recognises it when the indexer did not confirm."""
    box: str
    changes: list[Change] = []
    publications: list[Publication] = []


class Part(msgspec.Struct, frozen=True, kw_only=True):
    rows: list[Row]


def publication_of(id: str, commands: Sequence[NewCommand]) -> Publication:
    templates: dict[int, int] = {}
    known: list[Template] = []
    rows: list[Row] = []
    for new in commands:
        template = template_of(new)
        at = templates.get(key := _same(new))
        if at is None or known[at] != template:
            at = templates[key] = len(known)
            known.append(template)
        rows.append((new.id, new.agent, at))
    return Publication(id=id, templates=known, rows=rows)


def _same(new: NewCommand) -> int:
    """Commands of one publication share the action object; what else differs is compared."""
    return hash((id(new.action), new.request_id, new.target_id))


def template_of(new: NewCommand) -> Template:
    return Template(
        tenant=new.tenant,
        action=new.action,
        request_id=new.request_id,
        source=new.source,
        user=new.user,
        target_type=new.target_type,
        target_id=new.target_id,
        created_at=new.created_at,
        expires_at=new.expires_at,
    )


def command_of(seq: int, row: Row, template: Template) -> Command:
    """As it was at its publication."""
    return Command(id=row[0], agent=row[1], seq=seq, **msgspec.structs.asdict(template))


def numbered(n: int, entry: Entry) -> Iterator[tuple[int, Publication]]:
    """The publications of entry ``n``, each with the seq of its first command."""
    first = n * NUMBERS
    for publication in entry.publications:
        yield first, publication
        first += len(publication.rows)


def parts_of(publication: Publication) -> list[Part]:
    rows = publication.rows
    return [Part(rows=rows[start : start + PART_COMMANDS]) for start in range(0, len(rows), PART_COMMANDS)]


def part_ids(publication: Publication) -> list[str]:
    return [f"{publication.id}-{number}" for number in range(publication.parts)]
