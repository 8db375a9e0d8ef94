"""One member of a swarm, driven by hand: no loop, no network, no clock."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from osqbox.agent.client import Failure, Query, Send
from osqbox.agent.profile.dice import Dice
from osqbox.agent.swarm.build import Nursery, ProfileHosts
from osqbox.agent.swarm.member import MAX_LAG_S, Member, Shared, Strand, Timeline, counted_as
from osqbox.agent.swarm.plan import Growth, Server, SwarmPlan, Trouble, read_mix
from osqbox.agent.swarm.tally import HELD, Tally

START = 1_767_225_600.0


class Drive:
    """Answers what a member sends, as long as the test says, and counts virtual seconds."""

    def __init__(self, **more: Any) -> None:
        ticks = more.pop("ticks", lambda: 0.0)
        plan = SwarmPlan(
            Server("localhost:1", ""), Growth(1, 1.0, 1.0), read_mix("ubuntu"), "secret", interval_s=10, **more
        )
        self.timeline, self.tally = Timeline(), Tally()
        shared = Shared(self.timeline, self.tally, Dice("swarm", plan.seed), plan.trouble, ticks, START)
        self.member: Member = Nursery(plan, ProfileHosts(plan), shared).member(0, START)
        self.now = START
        self.sent: list[tuple[float, Send]] = []
        self.left: list[Query] = []
        """Queries that took too long to be answered on the spot."""
        self.answers: dict[str, Any] = {"enroll": {"node_key": "key"}}
        self.member.begin(START)

    def run(self, seconds: float) -> None:
        """Everything that happens in so many virtual seconds; calls take no time."""
        end = self.now + seconds
        while (due := self.timeline.next_due) is not None and due <= end:
            self.now = max(self.now, due)
            found = self.timeline.pop(self.now)
            if found is not None:
                _, member, strand, outcome = found
                self.finish(strand, member.resume(strand, outcome, self.now))
        self.now = end

    def finish(self, strand: Strand, work: Any) -> None:
        while work is not None:
            if isinstance(work, Query):
                self.left.append(work)
                return
            self.sent.append((self.now - START, work))
            work = self.member.resume(strand, self.answer(work), self.now)

    def answer(self, work: Send) -> Any:
        answer = self.answers.get(work.call, {})
        answer = next(answer, {}) if isinstance(answer, Iterator) else answer
        return answer if isinstance(answer, Failure) else json.dumps(answer).encode()

    def calls(self, call: str) -> list[float]:
        return [at for at, send in self.sent if send.call == call]


def test_calls_come_as_osqueryd_makes_them() -> None:
    drive = Drive()
    drive.run(125)
    assert [send.call for _, send in drive.sent[:3]] == ["enroll", "config", "read"]
    assert drive.calls("enroll") == [0]
    assert drive.calls("config") == [0, 60, 120]
    assert drive.calls("read") == [float(each) for each in range(0, 125, 10)]
    assert (drive.tally.agents, drive.tally.enrolled, drive.tally.total.errors) == (1, 1, 0)


def test_a_schedule_keeps_its_seconds_while_a_read_is_held() -> None:
    drive = Drive(flags={"schedule_splay_percent": "0"})
    drive.answers["config"] = {"schedule": {"t": {"query": "select unix_time from time", "interval": 2, "snapshot": 1}}}
    held: Any = None
    end = START + 9
    while (due := drive.timeline.next_due) is not None and due <= end:
        found = drive.timeline.pop(due)
        assert found is not None
        drive.now, member, strand, outcome = found
        work = member.resume(strand, outcome, drive.now)
        if isinstance(work, Send) and work.call == "read":
            held = strand  # and never answered
        else:
            drive.finish(strand, work)
    assert held is not None
    lines = [json.loads(send.body)["data"] for _, send in drive.sent if send.call == "log"]
    seconds = [line["unixTime"] - START for batch in lines for line in batch if "snapshot" in line]
    assert seconds == [0, 2, 4, 6]  # the line of second 8 waits for the next flush


def test_an_invalid_key_is_replaced() -> None:
    drive = Drive()
    drive.run(5)
    drive.answers["read"] = iter([{"node_invalid": True}])
    drive.run(5.5)
    assert (drive.tally.node_invalid, drive.tally.enrolled) == (1, 0)
    drive.run(60)
    assert drive.calls("enroll") == [0, 11]
    assert (drive.tally.node_invalid, drive.tally.enrolled) == (1, 1)
    assert set(drive.tally.kinds) == {"read: Request failed: Invalid node key"}


def test_a_lost_key_is_asked_for_at_once() -> None:
    drive = Drive()
    drive.run(5)
    drive.member.forget_key(drive.now)
    assert drive.tally.enrolled == 0
    drive.run(0.1)
    assert drive.calls("enroll") == [0, 5]
    assert drive.calls("config") == [0, 5]
    drive.member.forget_key(drive.now)
    drive.member.forget_key(drive.now)
    assert drive.tally.enrolled == 0


def test_a_thread_that_was_woken_while_it_waits_is_not_run_twice() -> None:
    """The wake of a sleep that is over is void."""
    drive = Drive()
    drive.run(5)
    work: Any = None
    while work is None:
        found = drive.timeline.pop(START + 10)
        assert found is not None
        _, member, strand, outcome = found
        work = member.resume(strand, outcome, START + 10)
    assert work.call == "read"
    for name in ("distributed", "config", "schedule", "flush"):
        member.wake(name, START + 10)
    waiting = [entry for entry in drive.timeline._heap if entry[3] is strand and entry[4] == strand.turn]
    assert all(entry[5] is not True for entry in waiting)


def test_a_thread_that_breaks_begins_again() -> None:
    """What no server should be able to do to an agent: it is counted, and the agent lives."""
    drive = Drive()
    drive.run(1)
    real, broken = drive.member.core.distributed, itertools.count()

    def distributed() -> Any:
        if next(broken) == 0:
            raise RuntimeError("a bug")
        yield from real()

    (strand,) = [one for one in drive.member._strands if one.name == "distributed"]
    strand.start, strand.running = distributed, distributed()
    strand.turn += 1
    drive.timeline.add(drive.now, drive.member, strand, None)
    drive.run(30)
    assert drive.tally.kinds == {"distributed: RuntimeError: a bug": 1}
    assert len(drive.calls("read")) >= 3


def test_a_query_that_takes_too_long_is_left_to_the_driver() -> None:
    """The stopwatch jumps a second each time it is looked at."""
    ticks = itertools.count()
    drive = Drive(ticks=lambda: float(next(ticks)))
    counting = "with recursive n(i) as (select 1 union all select i + 1 from n limit 99999) select sum(i) from n"
    drive.answers["read"] = {"queries": {"q": counting}}
    drive.run(1)
    assert drive.left == [Query(counting)]
    assert drive.calls("write") == []


def test_shares_of_queries_fail_by_the_seed() -> None:
    answers = []
    for _ in range(2):
        drive = Drive(trouble=Trouble(failing_queries=0.5))
        drive.answers["read"] = {"queries": {"q": "select 1"}}
        drive.run(300)
        answers.append([json.loads(send.body)["statuses"]["q"] for _, send in drive.sent if send.call == "write"])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 31
    assert 5 < sum(answers[0]) < 26


def test_which_reads_are_held() -> None:
    read, log = Send("read", "/", b""), Send("log", "/", b"")
    assert counted_as(read, b"{}", 0.5) == "read"
    assert counted_as(read, b"{}", 5.0) == HELD
    assert counted_as(read, Failure("timeout"), 16.0) == "read"
    assert counted_as(log, b"{}", 5.0) == "log"
    assert MAX_LAG_S <= 1


@pytest.mark.parametrize(("late_s", "told_s"), [(0.0, 0.0), (MAX_LAG_S / 2, 0.0), (MAX_LAG_S, MAX_LAG_S), (9.0, 9.0)])
def test_a_punctual_thread_is_told_the_time_it_asked_for(late_s: float, told_s: float) -> None:
    found = Drive().timeline.pop(START + late_s)
    assert found is not None
    assert found[0] == START + told_s
