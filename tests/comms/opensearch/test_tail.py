"""The tail: what a search may not see yet, by entry, agent and id."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from osqbox.comms.messages import Action, NewCommand
from osqbox.comms.opensearch.entries import NUMBERS, Entry, Publication, command_of, numbered, publication_of
from osqbox.comms.opensearch.tail import Tail


def new(id: str, agent: str = "a", action: Action | None = None, **facts: float) -> NewCommand:
    facts = {"created_at": 1.0, "expires_at": 100.0, **facts}
    return NewCommand(
        id=id, agent=agent, tenant="default", action=action or Action(name="restart"), request_id="r", **facts
    )  # type: ignore[arg-type]


def entry(*publications: Publication) -> Entry:
    return Entry(id="e", box="b", publications=list(publications))


def test_commands_that_share_an_action_share_a_template() -> None:
    action, other = Action(name="x", args={"deep": [1]}), Action(name="y")
    commands = [new("1", "a", action), new("2", "b", action), new("3", "c", other), new("4", "d", action, expires_at=7)]
    publication = publication_of("p", commands)
    assert [row[2] for row in publication.rows] == [0, 0, 1, 2]
    [(first, _)] = numbered(3, entry(publication))
    made = [command_of(first + at, row, publication.templates[row[2]]) for at, row in enumerate(publication.rows)]
    assert [(each.id, each.agent, each.action, each.expires_at) for each in made] == [
        (each.id, each.agent, each.action, each.expires_at) for each in commands
    ]
    assert [each.seq for each in made] == [3 * NUMBERS + at for at in range(4)]


def test_publications_of_one_entry_have_numbers_one_after_the_other() -> None:
    two = entry(publication_of("p", [new("1"), new("2")]), publication_of("q", [new("3")]))
    assert [first for first, _ in numbered(1, two)] == [NUMBERS, NUMBERS + 2]


def test_an_id_that_was_published_before_stays_what_it_was() -> None:
    tail = Tail()
    tail.take(1, entry(publication_of("p", [new("1", "a")])))
    tail.take(2, entry(publication_of("q", [new("1", "b"), new("2", "b")])))
    assert [each for _, each in tail.of_agent("b", 0)] == ["2"]
    found = tail.find("1")
    assert found is not None
    assert (found.agent, found.seq) == ("a", NUMBERS)
    tail.forget(1)
    tail.forget(2)
    assert len(tail) == 0
    assert tail.of_agent("a", 0) == tail.of_agent("b", 0) == []


def test_what_was_read_needs_no_search_when_it_is_let_go() -> None:
    tail = Tail()
    assert tail.needs_search("a", 0)
    tail.note_searched("a", 0)
    tail.note_searched("b", 0)
    tail.take(1, entry(publication_of("p", [new("1", "a"), new("2", "b")])))
    assert not tail.needs_search("a", 0)
    tail.note_searched("a", NUMBERS)  # it was read up to there
    tail.forget(1)
    assert not tail.needs_search("a", NUMBERS)
    assert tail.needs_search("a", 0)
    assert tail.needs_search("b", NUMBERS)
    assert tail.needs_search("b", 0)


def test_the_first_expiry_is_that_of_what_is_there() -> None:
    tail = Tail()
    assert tail.expires_at == float("inf")
    tail.take(1, entry(publication_of("p", [new("1", expires_at=5), new("2", expires_at=3)])))
    tail.take(2, entry(publication_of("q", [new("3", expires_at=4)])))
    assert tail.expires_at == 3
    tail.forget(1)
    assert tail.expires_at == 4


AGENTS = st.sampled_from("abc")


@given(st.lists(st.lists(AGENTS, min_size=1, max_size=4), max_size=8), st.integers(0, 9), AGENTS, st.integers(0, 40))
def test_an_agents_commands_are_those_of_the_entries_that_are_left(
    entries: list[list[str]], until: int, agent: str, limit: int
) -> None:
    tail, expected, number = Tail(), [], 0
    for n, agents in enumerate(entries, 1):
        commands = [new(f"{(number := number + 1)}", each) for each in agents]
        tail.take(n, entry(publication_of(f"p{n}", commands)))
        expected += [
            (n * NUMBERS + at, each.id) for at, each in enumerate(commands) if each.agent == agent and n > until
        ]
    tail.forget(until)
    assert tail.of_agent(agent, 0) == expected
    assert tail.of_agent(agent, 0, limit) == expected[:limit]
    for seq, _ in expected:
        assert tail.of_agent(agent, seq) == [each for each in expected if each[0] > seq]
    assert tail.first == next((n for n in range(1, len(entries) + 1) if n > until), None)
