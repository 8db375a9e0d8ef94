"""Signing keys: made once, rotated, removed, shared by boxes, and files that are none."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from osqbox.comms.errors import CommsError
from osqbox.comms.keys import KEYS_MAX, SigningKeys
from osqbox.comms.messages import Agent
from osqbox.comms.tokens import Tokens
from osqbox.errors import BadSetup

from ._identity import NOW, lay_key, pem

AGENT = Agent(uuid="u1", tenant="default", name="n1")


def test_the_first_run_makes_a_key_that_the_next_one_finds(tmp_path: Path) -> None:
    directory = tmp_path / "certs" / "comms-keys"
    first = SigningKeys.open(directory, "RS256", NOW)
    (file,) = directory.glob("*.key")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first.signer(NOW).made_at == NOW
    again = SigningKeys.open(directory, "RS256", NOW + 100)
    assert again.signer(NOW).kid == first.signer(NOW).kid
    assert Tokens(again).check(Tokens(first).issue(AGENT, NOW), NOW).uuid == "u1"


def test_another_algorithm_gets_a_key_of_its_own_and_checks_the_others(tmp_path: Path) -> None:
    rsa = Tokens(SigningKeys.open(tmp_path, "RS256", NOW))
    old = rsa.issue(AGENT, NOW)
    keys = SigningKeys.open(tmp_path, "ES256", NOW)
    assert [key.algorithm for key in keys.all()] == ["RS256", "ES256"]
    assert keys.signer(NOW).algorithm == "ES256"
    assert Tokens(keys).check(old, NOW).uuid == "u1"
    assert SigningKeys.open(tmp_path, "RS256", NOW).signer(NOW).algorithm == "RS256"


def test_after_a_rotation_old_tokens_are_good_until_their_key_is_removed(tmp_path: Path) -> None:
    lay_key(tmp_path)
    keys = SigningKeys.open(tmp_path, "RS256", NOW)
    tokens, first = Tokens(keys), keys.signer(NOW)
    old = tokens.issue(AGENT, NOW)
    second = keys.rotate(NOW + 10)
    assert keys.signer(NOW + 10) == second != first
    new = tokens.issue(AGENT, NOW + 10)
    assert tokens.check(old, NOW + 10).uuid == tokens.check(new, NOW + 10).uuid == "u1"
    with pytest.raises(CommsError, match="rotate first") as caught:
        keys.remove(second.kid)
    assert caught.value.status == 409
    keys.remove(first.kid)
    with pytest.raises(CommsError, match="no key of that kid"):
        tokens.check(old, NOW + 10)
    assert tokens.check(new, NOW + 10).uuid == "u1"
    with pytest.raises(CommsError, match="does not exist"):
        keys.remove(first.kid)


def test_a_rotation_signs_even_when_the_clock_went_back(tmp_path: Path) -> None:
    lay_key(tmp_path)
    keys = SigningKeys.open(tmp_path, "RS256", NOW)
    assert keys.rotate(NOW - 1e6).kid == keys.signer(NOW).kid
    assert len({key.kid for key in keys.all()}) == 2


def test_two_boxes_on_one_directory_follow_each_other(tmp_path: Path) -> None:
    lay_key(tmp_path)
    one, two = (SigningKeys.open(tmp_path, "RS256", NOW) for _ in range(2))
    assert Tokens(two).check(Tokens(one).issue(AGENT, NOW), NOW).uuid == "u1"
    first, second = one.signer(NOW), one.rotate(NOW)
    token = Tokens(one).issue(AGENT, NOW)
    later = NOW + 2
    assert Tokens(two).check(token, later).uuid == "u1"
    assert two.signer(later) == second
    two.remove(first.kid)
    assert one.find(first.kid, later + 2) is None


def test_two_boxes_that_start_at_once_make_one_key(tmp_path: Path) -> None:
    found: list[str] = []
    start = threading.Barrier(4)

    def box() -> None:
        start.wait(10)
        found.append(SigningKeys.open(tmp_path, "ES256", NOW).signer(NOW).kid)

    threads = [threading.Thread(target=box) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert len(set(found)) == 1


def test_reload_tells_whether_keys_came_or_went(tmp_path: Path) -> None:
    lay_key(tmp_path)
    keys = SigningKeys.open(tmp_path, "RS256", NOW)
    assert not keys.reload()
    file = lay_key(tmp_path, number=1, at=NOW + 1)
    assert keys.reload()
    assert not keys.reload()
    file.unlink()
    assert keys.reload()


def test_a_key_of_ones_own_signs_until_one_is_made_here(tmp_path: Path) -> None:
    (tmp_path / "management-api.key").write_bytes(pem("RS256", 1))
    keys = SigningKeys.open(tmp_path, "RS256", NOW)
    (own,) = keys.all()
    assert (keys.signer(NOW), own.made_at, own.as_json()["made_at"]) == (own, 0, None)
    assert keys.rotate(NOW) == keys.signer(NOW) != own


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"-----BEGIN %b-----\nAAAA\n-----END %b-----\n" % ((b"PRIVATE KEY",) * 2)]
)
def test_a_file_that_is_no_key_stops_the_start_and_nothing_later(content: bytes, tmp_path: Path) -> None:
    lay_key(tmp_path)
    keys = SigningKeys.open(tmp_path, "RS256", NOW)
    (tmp_path / "bad.key").write_bytes(content)
    assert not keys.reload()
    assert keys.signer(NOW + 5).algorithm == "RS256"
    with pytest.raises(BadSetup, match=r"bad.key: expected a private key"):
        SigningKeys.open(tmp_path, "RS256", NOW)


def test_weak_and_foreign_kinds_of_keys_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    weak = (
        rsa.generate_private_key(65537, 1024),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    )
    for number, key in enumerate(weak):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "1.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        with pytest.raises(BadSetup, match="RSA of at least 2048 bits or EC P-256"):
            SigningKeys.open(directory, "RS256", NOW)


def test_without_any_key_left_logins_wait_and_nobody_is_let_in(tmp_path: Path) -> None:
    file = lay_key(tmp_path)
    keys = SigningKeys.open(tmp_path, "RS256", NOW)
    token = Tokens(keys).issue(AGENT, NOW)
    file.unlink()
    with pytest.raises(CommsError, match="rotate") as caught:
        Tokens(keys).issue(AGENT, NOW + 2)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    with pytest.raises(CommsError, match="no key of that kid"):
        Tokens(keys).check(token, NOW + 2)
    keys.rotate(NOW + 3)
    assert Tokens(keys).issue(AGENT, NOW + 3)


def test_only_known_algorithms_and_usable_directories(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="expected RS256 or ES256, got 'none'"):
        SigningKeys.open(tmp_path, "none", NOW)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadSetup, match="cannot be written"):
        SigningKeys.open(tmp_path / "file", "RS256", NOW)


def test_keys_are_bounded(tmp_path: Path) -> None:
    for number in range(KEYS_MAX):
        lay_key(tmp_path, "ES256", number, NOW + number)
    keys = SigningKeys.open(tmp_path, "ES256", NOW)
    assert len(keys.all()) == KEYS_MAX
    with pytest.raises(CommsError, match="remove old ones first"):
        keys.rotate(NOW)


def test_nothing_shows_a_private_key(tmp_path: Path) -> None:
    lay_key(tmp_path)
    key = SigningKeys.open(tmp_path, "RS256", NOW).signer(NOW)
    assert "private=" not in repr(key)
    assert set(key.as_json()) == {"kid", "algorithm", "file", "made_at"}
