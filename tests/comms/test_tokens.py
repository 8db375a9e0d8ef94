"""Tokens: what they say, and every way in which one is not in order."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from osqbox.comms.errors import CommsError
from osqbox.comms.keys import SigningKeys
from osqbox.comms.messages import Agent
from osqbox.comms.tokens import Tokens

from ._identity import NOW, lay_key, pem

AGENT = Agent(uuid="01890a5d-ac96-774b-bcce-b302099a8057", tenant="default", name="web-1", key_version=3)


@pytest.fixture
def keys(tmp_path: Path) -> SigningKeys:
    lay_key(tmp_path)
    return SigningKeys.open(tmp_path, "RS256", NOW)


@pytest.fixture
def tokens(keys: SigningKeys) -> Tokens:
    return Tokens(keys)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    header, payload, signature = (base64.urlsafe_b64decode(word + "==") for word in token.split("."))
    return json.loads(header), json.loads(payload), signature


def forged(header: Any, payload: Any, sign: Callable[[bytes], bytes]) -> str:
    """A JWT by hand, independent of the library that checks it."""
    signing_input = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(payload).encode())}"
    return f"{signing_input}.{b64(sign(signing_input.encode()))}"


def by_rsa(number: int = 0) -> Callable[[bytes], bytes]:
    key: Any = load_pem_private_key(pem("RS256", number), None)
    return lambda data: key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def by_hmac(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda data: hmac.digest(secret, data, hashlib.sha256)


def refused(tokens: Tokens, token: str, now: float = NOW) -> tuple[int, str, int]:
    with pytest.raises(CommsError) as caught:
        tokens.check(token, now)
    assert caught.value.message
    return caught.value.status, caught.value.reason, caught.value.code


INVALID = (403, "invalid_token", 2706)
EXPIRED = (403, "expired_token", 2707)


def test_a_token_says_what_the_communications_api_says(tokens: Tokens, keys: SigningKeys) -> None:
    header, payload, signature = parts(token := tokens.issue(AGENT, NOW + 0.9))
    assert header == {"alg": "RS256", "typ": "JWT", "kid": keys.all()[0].kid}
    assert payload == {
        "iss": "wazuh",
        "aud": "Wazuh Communications API",
        "iat": 1_700_000_000,
        "exp": 1_700_000_900,
        "uuid": AGENT.uuid,
        "key_version": 3,
    }
    public: Any = load_pem_private_key(pem("RS256", 0), None).public_key()
    public.verify(signature, token.rpartition(".")[0].encode(), padding.PKCS1v15(), hashes.SHA256())
    claims = tokens.check(token, NOW + 899)
    assert (claims.uuid, claims.key_version, claims.expires_at - claims.issued_at) == (AGENT.uuid, 3, 900)


def test_es256_is_checked_with_its_own_algorithm(tmp_path: Path) -> None:
    lay_key(tmp_path, "ES256")
    tokens = Tokens(SigningKeys.open(tmp_path, "ES256", NOW), lifetime_s=60)
    token = tokens.issue(AGENT, NOW)
    header, _, signature = parts(token)
    assert (header["alg"], len(signature)) == ("ES256", 64)
    assert tokens.check(token, NOW + 59).uuid == AGENT.uuid
    assert refused(tokens, token, NOW + 60) == EXPIRED


def test_a_token_ends_with_its_lifetime(tokens: Tokens) -> None:
    token = tokens.issue(AGENT, NOW)
    assert tokens.check(token, NOW + 899.9)
    assert refused(tokens, token, NOW + 900) == EXPIRED
    assert refused(tokens, token, NOW + 1e9) == EXPIRED


def test_the_clocks_of_two_boxes_may_differ(tokens: Tokens) -> None:
    token = tokens.issue(AGENT, NOW)
    assert tokens.check(token, NOW - 60)
    assert refused(tokens, token, NOW - 61) == INVALID


def test_a_box_with_another_lifetime_refuses(tokens: Tokens, keys: SigningKeys) -> None:
    assert refused(Tokens(keys, lifetime_s=901), tokens.issue(AGENT, NOW)) == INVALID


GOOD = {
    "iss": "wazuh", "aud": "Wazuh Communications API", "iat": int(NOW), "exp": int(NOW) + 900,
    "uuid": AGENT.uuid, "key_version": 3,
}  # fmt: skip


def test_the_payload_by_hand_is_accepted(tokens: Tokens, keys: SigningKeys) -> None:
    """Shows that what follows is refused for what is wrong with it."""
    header = {"alg": "RS256", "kid": keys.all()[0].kid, "typ": "JWT"}
    assert tokens.check(forged(header, GOOD, by_rsa()), NOW).uuid == AGENT.uuid


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "somebody"},
        {"aud": "somebody"},
        {"aud": ["Wazuh Communications API"]},
        {"exp": int(NOW) + 901},
        {"exp": int(NOW) + 899},
        {"exp": float(NOW) + 900.5},
        {"exp": None},
        {"iat": None},
        {"iat": str(int(NOW))},
        {"iat": True},
        {"uuid": None},
        {"uuid": 7},
        {"key_version": None},
        {"key_version": "3"},
        {"nbf": int(NOW)},
    ],
    ids=str,
)
def test_claims_that_are_not_in_order_are_refused(change: dict[str, Any], tokens: Tokens, keys: SigningKeys) -> None:
    payload = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    header = {"alg": "RS256", "kid": keys.all()[0].kid, "typ": "JWT"}
    assert refused(tokens, forged(header, payload, by_rsa())) == INVALID


def test_nobody_may_choose_the_algorithm(tokens: Tokens, keys: SigningKeys) -> None:
    kid = keys.all()[0].kid
    public = keys.all()[0].public
    secrets = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        kid.encode(),
        b"",
    ]
    for algorithm in ("none", "None", "NONE", ""):
        assert refused(tokens, forged({"alg": algorithm, "kid": kid, "typ": "JWT"}, GOOD, lambda _: b"")) == INVALID
        assert refused(tokens, forged({"alg": algorithm, "kid": kid, "typ": "JWT"}, GOOD, by_rsa())) == INVALID
    for secret in secrets:
        assert refused(tokens, forged({"alg": "HS256", "kid": kid, "typ": "JWT"}, GOOD, by_hmac(secret))) == INVALID
        assert refused(tokens, forged({"alg": "RS256", "kid": kid, "typ": "JWT"}, GOOD, by_hmac(secret))) == INVALID
    for algorithm in ("RS384", "RS512", "PS256", "ES256"):
        assert refused(tokens, forged({"alg": algorithm, "kid": kid, "typ": "JWT"}, GOOD, by_rsa())) == INVALID


def test_foreign_keys_sign_nothing_here(tokens: Tokens, keys: SigningKeys, tmp_path: Path) -> None:
    kid = keys.all()[0].kid
    assert refused(tokens, forged({"alg": "RS256", "kid": kid, "typ": "JWT"}, GOOD, by_rsa(1))) == INVALID
    lay_key(tmp_path / "elsewhere", number=1)
    foreign = SigningKeys.open(tmp_path / "elsewhere", "RS256", NOW)
    assert refused(tokens, Tokens(foreign).issue(AGENT, NOW)) == INVALID


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "RS256", "typ": "JWT"},
        {"alg": "RS256", "typ": "JWT", "kid": "../../keys/1"},
        {"alg": "RS256", "typ": "JWT", "kid": 1},
        {"alg": "RS256", "typ": "JWT", "jwk": {"kty": "RSA"}},
        ["RS256"],
        "RS256",
        None,
    ],
    ids=str,
)
def test_a_header_that_is_not_ours_is_refused(header: Any, tokens: Tokens, keys: SigningKeys) -> None:
    if isinstance(header, dict) and "jwk" in header:
        header = {**header, "kid": keys.all()[0].kid}
    assert refused(tokens, forged(header, GOOD, by_rsa())) == INVALID


def test_what_is_no_token_is_refused(tokens: Tokens) -> None:
    good = tokens.issue(AGENT, NOW)
    head, body, signature = good.split(".")
    swapped = tokens.issue(Agent(uuid="other", tenant="default", name="other"), NOW).split(".")[1]
    nested = b64(b"[" * 3000)
    broken = [
        *("", ".", "..", "...", "a.b.c", "é.b.c", "\x00.\x00.\x00", "x" * 8193, "😀" * 3),
        *(head, f"{head}.{body}", f"{head}.{body}.", f"{head}..{signature}", f"{good}.{signature}", f"{good}x"),
        *(f"{head}.{swapped}.{signature}", f"{nested}.{body}.{signature}", f"{head}.{nested}.{signature}"),
        good.replace(".", "", 1),
    ]
    for token in broken:
        assert refused(tokens, token) == INVALID, token[:80]
    for place in range(0, len(good), 7):
        other = "A" if good[place] != "A" else "B"
        changed = good[:place] + other + good[place + 1 :]
        assert refused(tokens, changed) == INVALID, place


def test_no_refusal_tells_the_token(tokens: Tokens) -> None:
    token = tokens.issue(AGENT, NOW)
    for bad in (token[:-10] + "AAAAAAAAAA", token + "x"):
        with pytest.raises(CommsError) as caught:
            tokens.check(bad, NOW)
        assert token[40:60] not in str(caught.value)
