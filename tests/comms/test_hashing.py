"""How keys are kept, and who is recognised without hashing."""

from __future__ import annotations

import base64
import hashlib

import pytest
import trio
import trio.testing

from osqbox.comms.errors import CommsError
from osqbox.comms.hashing import NOBODY, Hasher

KEY = "abcdefghijklmnopqrstuvwxyz012345"


def test_a_key_is_kept_as_upstream_keeps_it() -> None:
    async def test() -> None:
        kept = base64.b64decode(await Hasher().hash(KEY))
        assert len(kept) == 48
        assert kept[16:] == hashlib.pbkdf2_hmac("sha256", KEY.encode(), kept[:16], 100_000)

    trio.run(test)


def test_equal_keys_are_kept_in_different_ways_and_both_are_right() -> None:
    async def test() -> None:
        hasher = Hasher()
        one, two = await hasher.hash(KEY), await hasher.hash(KEY)
        assert one != two
        assert await hasher.verify(KEY, one)
        assert await hasher.verify(KEY, two)
        assert not await hasher.verify(KEY + "6", one)

    trio.run(test)


@pytest.mark.parametrize(
    "kept", ["", "not base64!", "AAAA", NOBODY, NOBODY[:-4], "é", base64.b64encode(b"x" * 49).decode()]
)
def test_a_damaged_hash_lets_nobody_in(kept: str) -> None:
    async def test() -> None:
        hasher = Hasher()
        for key in (KEY, ""):
            assert not await hasher.verify(key, kept)
        assert hasher.statistics()["remembered"] == 0

    trio.run(test)


def test_who_was_right_before_is_recognised_within_a_bound() -> None:
    async def test() -> None:
        hasher, other = Hasher(remembered_max=2), Hasher()
        kept = [await other.hash(KEY) for _ in range(3)]
        for one in kept[:2]:
            assert await hasher.verify(KEY, one)
        assert await hasher.verify(KEY, kept[0])  # the other is now the one that was seen the longest ago
        assert await hasher.verify(KEY, kept[2])
        assert [hasher.remembers(KEY, one) for one in kept] == [True, False, True]
        assert hasher.statistics() == {"waiting": 0, "hashed": 3, "remembered": 2}
        assert not hasher.remembers(KEY + "x", kept[0])

    trio.run(test)


def test_who_was_just_added_is_recognised_and_nobody_else() -> None:
    async def test() -> None:
        hasher = Hasher()
        kept = await hasher.hash(KEY)
        assert await hasher.verify(KEY, kept)
        assert hasher.statistics() == {"waiting": 0, "hashed": 1, "remembered": 1}
        for key, key_hash in ((KEY + "\0", kept), (KEY[:-1], kept), (KEY, await Hasher().hash(KEY[:-1]))):
            assert not hasher.remembers(key, key_hash)
            assert not await hasher.verify(key, key_hash)

    trio.run(test)


def test_a_caller_that_leaves_gives_its_place_back() -> None:
    async def test() -> None:
        hasher = Hasher(waiting_max=1)
        async with hasher._turn, trio.open_nursery() as nursery:
            nursery.start_soon(hasher.hash, KEY)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(CommsError, match="waiting already") as caught:
                await hasher.hash(KEY)
            nursery.cancel_scope.cancel()
        assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
        assert hasher.statistics()["waiting"] == 0
        assert await hasher.hash(KEY)

    trio.run(test)
