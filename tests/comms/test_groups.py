"""Groups in SQLite: created, configured in versions, deleted when nobody is in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio

from osqbox.comms.errors import CommsError
from osqbox.comms.messages import Change, Group
from osqbox.comms.sqlite import groups as table

from ._identity import NOW, Rig, refusal, with_rig


def test_default_always_exists(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        default = Group(tenant="default", name="default")
        assert await rig.groups.find("default", "default") == default
        assert await rig.groups.find("default", "web") is None
        assert await rig.groups.page("default") == [default]
        assert await rig.groups.versions("default", "default") == []
        error = await refusal(lambda: rig.groups.delete("default", "default", actor="op"))
        assert (error.status, "always exists" in error.message) == (409, True)

    with_rig(tmp_path, test)


def test_a_configuration_has_versions(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        text = "agent:\n  interval: 10  # Sekunden für alle\n"
        first = await rig.groups.put("default", "web", text, actor="op", expected_version=0)
        assert first == Group(
            tenant="default",
            name="web",
            configuration=text,
            version=1,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            changed_at=NOW,
            changed_by="op",
        )
        rig.clock.at += 5
        second = await rig.groups.put("default", "web", "a: 1", actor="another", expected_version=1)
        assert (second.version, second.changed_at, second.changed_by) == (2, NOW + 5, "another")
        back = await rig.groups.put("default", "web", text, actor="op", expected_version=None)
        assert (back.version, back.sha256) == (3, first.sha256)
        assert await rig.groups.find("default", "web") == back
        assert await rig.groups.versions("default", "web") == [back, second, first]
        assert rig.changes == [Change(kind="groups", tenant="default")] * 3

    with_rig(tmp_path, test)


def test_the_same_again_changes_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        first = await rig.groups.put("default", "web", "a: 1", actor="op", expected_version=None)
        rig.changes.clear()
        assert await rig.groups.put("default", "web", "a: 1", actor="another", expected_version=None) == first
        assert await rig.groups.put("default", "default", "", actor="op", expected_version=0) == Group(
            tenant="default", name="default"
        )
        assert rig.changes == []
        assert len(await rig.audited("group")) == 1
        assert [data for kind, data in await rig.told() if kind == "configuration_changed"] == [
            {"group": "web", "version": 1, "sha256": first.sha256}
        ]

    with_rig(tmp_path, test)


def test_an_empty_group_has_version_0_until_it_is_configured(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        made = await rig.groups.put("default", "web", "", actor="op", expected_version=0)
        assert (made.version, made.sha256) == (0, "")
        assert await rig.groups.find("default", "web") == made
        assert await rig.groups.versions("default", "web") == []
        assert (await rig.groups.put("default", "web", "a: 1", actor="op", expected_version=0)).version == 1
        emptied = await rig.groups.put("default", "web", "", actor="op", expected_version=1)
        assert (emptied.version, emptied.sha256) == (2, hashlib.sha256(b"").hexdigest())

    with_rig(tmp_path, test)


def test_of_two_who_change_the_same_version_one_is_told(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.groups.put("default", "web", "a: 0", actor="op", expected_version=None)
        won: list[int] = []
        refused: list[int] = []

        async def change(number: int) -> None:
            try:
                found = await rig.groups.put("default", "web", f"a: {number}", actor="op", expected_version=1)
            except CommsError as error:
                refused.append(error.status)
            else:
                won.append(found.version)

        async with trio.open_nursery() as nursery:
            for number in range(1, 6):
                nursery.start_soon(change, number)
        assert (won, refused) == ([2], [409] * 4)

    with_rig(tmp_path, test)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "a,b", "ä", "x" * 129, "a\nb", "../etc"])
def test_a_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        error = await refusal(lambda: rig.groups.put("default", name, "a: 1", actor="op", expected_version=None))
        assert error.status == 400
        assert "group: expected" in error.message

    with_rig(tmp_path, test)


def test_what_is_too_large_or_missing_is_refused(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        groups = rig.groups
        big = "a" * (table.CONFIGURATION_BYTES + 1)
        for tenant, text, status in (("default", big, 400), ("nowhere", "a: 1", 404), ("default", "a: \ud800", 400)):
            error = await refusal(
                lambda tenant=tenant, text=text: groups.put(tenant, "web", text, actor="op", expected_version=None)
            )
            assert error.status == status
        assert (await refusal(lambda: groups.versions("default", "web"))).status == 404
        assert (await refusal(lambda: groups.delete("default", "web", actor="op"))).status == 404
        assert rig.changes == []

    with_rig(tmp_path, test)


def test_a_group_is_deleted_once_nobody_is_in_it(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.groups.put("default", "web", "a: 1", actor="op", expected_version=None)
        await rig.add("u1", groups=("default", "web"))
        error = await refusal(lambda: rig.groups.delete("default", "web", actor="op"))
        assert (error.status, error.message) == (
            409,
            "group 'web': expected one without agents, got one with 1; move them first",
        )
        await rig.agents.change("u1", actor="op", groups=["default"])
        await rig.groups.delete("default", "web", actor="op")
        assert await rig.groups.find("default", "web") is None
        again = await rig.groups.put("default", "web", "b: 1", actor="op", expected_version=0)
        assert await rig.groups.versions("default", "web") == [again]
        assert [row["action"] for row in await rig.audited("group")] == ["group.put", "group.delete", "group.put"]

    with_rig(tmp_path, test)


def test_groups_of_another_tenant_look_as_if_there_were_none(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add_tenant("other")
        await rig.groups.put("other", "web", "a: 1", actor="op", expected_version=None)
        assert await rig.groups.find("default", "web") is None
        assert [group.name for group in await rig.groups.page("default")] == ["default"]
        assert (await refusal(lambda: rig.add("u1", groups=("web",)))).status == 404
        assert [group.name for group in await rig.groups.page("other")] == ["default", "web"]

    with_rig(tmp_path, test)


def test_old_versions_are_forgotten_beyond_a_bound(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        for number in range(table.KEPT_VERSIONS + 3):
            await rig.groups.put("default", "web", f"a: {number}", actor="op", expected_version=number)
        kept = [group.version for group in await rig.groups.versions("default", "web")]
        assert kept == list(range(table.KEPT_VERSIONS + 3, 3, -1))

    with_rig(tmp_path, test)
