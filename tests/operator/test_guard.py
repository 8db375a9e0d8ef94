"""Who is let in, and what every answer carries."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import trio
from quart.testing.connections import WebsocketResponseError

AUTHORIZED = {"Authorization": "Bearer a-token-of-tests"}
OPEN = {"/livez", "/readyz"}
BARE = {"/metrics", "/security/user/authenticate", "/agents"}
"""Besides the API; the last two are where agents enroll that know no other path."""


def rules(rig: Any) -> list[tuple[str, str]]:
    """Every route of the API with every method it knows."""
    return [
        (method, re.sub(r"<[^>]+>", "1", rule.rule))
        for rule in rig.app.url_map.iter_rules()
        if not rule.endpoint.startswith("pages.")
        for method in rule.methods
    ]


def test_every_route_but_the_probes_refuses_without_the_token(rig):
    async def test(box):
        walked = [each for each in rules(box) if each[1] not in OPEN]
        assert len(walked) > 40
        assert all(path.startswith("/api/v1/") or path in BARE for _, path in walked)
        for method, path in walked:
            answered = await box.ask(method, path, json=None if method in ("GET", "HEAD") else {})
            assert (method, path, answered.status) == (method, path, 401)
            assert answered.headers["WWW-Authenticate"].startswith("Bearer")
            if method != "HEAD":
                assert (answered.json["reason"], answered.json["hint"]) == ("unauthorized", "osqbox env")
        assert (await box.get("/api/v1/tenants")).json[0]["closed_at"] is None
        assert not box.stops

    rig(test)


def test_every_page_leads_a_stranger_to_the_sign_in(rig):
    async def test(box):
        open_pages = {"/sign-in", "/sign-out", "/static/style.css", "/static/icon.svg"}
        found = [rule for rule in box.app.url_map.iter_rules() if rule.endpoint.startswith("pages.")]
        walked = [(rule, method) for rule in found if rule.rule not in open_pages for method in rule.methods]
        assert len(walked) > 15
        for rule, method in walked:
            answered = await box.ask(method, re.sub(r"<[^>]+>", "1", rule.rule), headers=AUTHORIZED)
            assert (rule.rule, answered.status, answered.headers["Location"]) == (rule.rule, 303, "/sign-in")

    rig(test)


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer a-token-of-test",
        "Bearer a-token-of-tests2",
        "Basic a-token-of-tests",
        "a-token-of-tests",
        "Bearer \xff\xfe",
    ],
)
def test_only_the_very_token_opens(rig, authorization):
    async def test(box):
        answered = await box.ask("GET", "/api/v1/info", headers={"Authorization": authorization})
        assert answered.status == 401
        assert "a-token-of-tests" not in answered.body.decode().replace(authorization, "")

    rig(test)


def test_the_scheme_is_case_insensitive_as_http_has_it(rig):
    async def test(box):
        answered = await box.ask("GET", "/api/v1/info", headers={"Authorization": "bearer a-token-of-tests"})
        assert answered.status == 200

    rig(test)


def test_unknown_paths_tell_a_stranger_nothing(rig):
    async def test(box):
        for path in ("/nope", "/api/v1/nope", "/api/v1//info", "/static/x", "/docs", "/redocs", "/scalar"):
            assert (await box.ask("GET", path)).status == 401
            assert (await box.ask("GET", path, headers=AUTHORIZED)).status == 404

    rig(test)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1", "127.0.0.1:80", ""])
def test_a_rebound_name_reaches_nothing(rig, host):
    async def test(box):
        for path in ("/livez", "/api/v1/info", "/nope"):
            answered = await box.ask("GET", path, headers={**AUTHORIZED, "Host": host})
            assert (answered.status, answered.json["reason"]) == (421, "wrong_host")

    rig(test)


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "LOCALHOST:8080", "[::1]:8080"])
def test_own_names_are_served(rig, host):
    async def test(box):
        assert (await box.ask("GET", "/livez", headers={"Host": host})).json == {"live": True}

    rig(test)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:8080"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "https://localhost:8080"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8081"}, 403),
        ({"Origin": "file://127.0.0.1:8080"}, 403),
        ({"Origin": "http://127.0.0.1:8080/"}, 403),
    ],
)
def test_a_foreign_page_changes_nothing_even_with_the_token(rig, headers, status):
    async def test(box):
        answered = await box.ask("PATCH", "/api/v1/tenants/default", headers={**AUTHORIZED, **headers}, json={})
        assert answered.status == status
        assert (await box.ask("GET", "/api/v1/tenants", headers={**AUTHORIZED, **headers})).status == 200

    rig(test)


def test_every_answer_is_hardened(rig):
    async def test(box):
        for method, path, headers in (
            ("GET", "/livez", {}),
            ("GET", "/api/v1/info", {}),
            ("GET", "/api/v1/info", AUTHORIZED),
            ("GET", "/api/v1/logs", AUTHORIZED),
            ("GET", "/nope", AUTHORIZED),
            ("DELETE", "/livez", AUTHORIZED),
            ("GET", "/livez", {"Host": "evil.example"}),
        ):
            shown = (await box.ask(method, path, headers=headers)).headers
            assert "default-src 'none'" in shown["Content-Security-Policy"]
            assert "frame-ancestors 'none'" in shown["Content-Security-Policy"]
            assert shown["X-Content-Type-Options"] == "nosniff"
            assert shown["X-Frame-Options"] == "DENY"
            assert shown["Cache-Control"] == "no-store"
            assert "Access-Control-Allow-Origin" not in shown

    rig(test)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({**AUTHORIZED, "Origin": "http://evil.example"}, 403),
        ({**AUTHORIZED, "Host": "evil.example"}, 421),
        (AUTHORIZED, 404),
    ],
)
def test_a_websocket_is_guarded_like_everything(rig, headers, status):
    async def test(box):
        opened = box.app.test_client().websocket("/api/v1/shells", headers={"Host": "127.0.0.1:8080", **headers})
        statuses = []
        try:
            async with opened as websocket:
                await websocket.receive()
        except* WebsocketResponseError as refused:
            statuses = [each.response.status_code for each in refused.exceptions]
        assert statuses == [status]

    rig(test)


def test_a_preflight_is_not_answered(rig):
    async def test(box):
        headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "GET"}
        assert (await box.ask("OPTIONS", "/api/v1/info", headers=headers)).status == 403
        assert (await box.ask("OPTIONS", "/api/v1/info", headers=AUTHORIZED)).status == 405

    rig(test)


def test_a_wrong_method_names_the_right_ones(rig):
    async def test(box):
        answered = await box.call("PUT", "/api/v1/tenants", status=405)
        assert answered.json["reason"] == "wrong_method"
        assert {"GET", "POST"} <= set(re.split(", *", answered.headers["Allow"]))

    rig(test)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "bad_body"),
        (b"{", "bad_body"),
        (b"[]", "bad_body"),
        (b"nul", "bad_body"),
        (b'{"name": 1}', "bad_body"),
        (b'{"nam": "blue"}', "bad_body"),
        (b'{"name": "blue", "open": "yes"}', "bad_body"),
        (b'{"name": "bl\xff"}', "bad_body"),
        (b'{"name": "\\ud800"}', "bad_body"),
        (b'{"name": ' + b"[" * 200_000, "bad_body"),
        (b'{"name": "Blue"}', "bad_usage"),
        (b'{"name": "blue", "reenroll": "sometimes"}', "bad_usage"),
        (b'{"name": "blue", "enroll_secret": " "}', "bad_usage"),
    ],
)
def test_a_bad_body_is_told_what_was_expected(rig, data, reason):
    async def test(box):
        answered = await box.call(
            "POST", "/api/v1/tenants", status=400, data=data, headers={"Content-Type": "application/json"}
        )
        assert answered.json["reason"] == reason
        assert len((await box.get("/api/v1/tenants")).json) == 1

    rig(test)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_a_form_is_not_json(rig, kind):
    async def test(box):
        answered = await box.call(
            "POST", "/api/v1/tenants", status=415, data=b'{"name": "blue"}', headers={"Content-Type": kind}
        )
        assert answered.json["reason"] == "wrong_media"

    rig(test)


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/nodes?tags=x",
        "/api/v1/nodes?status=gone",
        "/api/v1/campaigns?limit=0",
        "/api/v1/campaigns?limit=ten",
        "/api/v1/logs?follow=perhaps",
        "/api/v1/logs?limit=-1",
        "/api/v1/logs?type=results",
        "/api/v1/stream?after=-1",
        "/api/v1/carves?limit=1000000",
    ],
)
def test_a_bad_query_is_refused_not_ignored(rig, path):
    async def test(box):
        answered = await box.get(path, 400)
        assert answered.json["reason"] == "bad_query"

    rig(test)


def test_numbers_too_large_for_the_database_are_no_internal_error(rig):
    async def test(box):
        huge = 2**70
        await box.get(f"/api/v1/logs?after={huge}", 400)
        await box.delete(f"/api/v1/tenants/default/secrets/{huge}", 400)
        await box.put("/api/v1/configs/a", {"content": {}, "priority": huge}, 400)

    rig(test)


def test_a_body_larger_than_16_mib_is_refused(rig):
    async def test(box):
        async with box.served() as client:
            named = await client.put("/api/v1/configs/a", content=b" " * (17 << 20), headers=JSON)
            assert named.status_code == 413
            assert isinstance(named.json()["error"], str)

        async def chunks():
            for _ in range(17):
                yield b" " * (1 << 20)

        async with box.served() as client:
            counted = await client.put("/api/v1/configs/a", content=chunks(), headers=JSON)
            assert counted.status_code == 413
            assert isinstance(counted.json()["error"], str)

    rig(test)


JSON = {"Content-Type": "application/json"}


def test_a_bug_is_told_without_its_text(rig, caplog):
    async def test(box):
        def broken(*_):
            raise RuntimeError("a secret detail")

        box.store.read = broken
        with caplog.at_level(logging.ERROR):
            answered = await box.get("/api/v1/tenants", 500)
        assert answered.json == {"error": "internal error; the box's log has it", "reason": "internal", "hint": None}
        assert "a secret detail" in caplog.text

        async def broken_twice(_):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise RuntimeError("another secret detail")

        box.store.read = broken_twice
        with caplog.at_level(logging.ERROR):
            answered = await box.get("/api/v1/tenants", 500)
        assert b"secret detail" not in answered.body

    rig(test)


def test_a_closing_store_says_so(rig):
    async def test(box):
        await box.store.aclose()
        answered = await box.ask("PATCH", "/api/v1/tenants/default", headers=AUTHORIZED, json={})
        assert (answered.status, answered.json["reason"]) == (503, "stopping")

    rig(test)


def test_an_escaped_slash_stays_in_its_word(rig):
    async def test(box):
        node = await box.enroll("web/01")
        async with box.served() as client:
            found = await client.get("/api/v1/nodes/web%2F01")
            assert found.json()["id"] == node.id
            assert (await client.get("/api/v1/nodes/web%2f01/config")).json()["config"] == {}
            assert (await client.get("/api/v1/nodes/web/01")).status_code == 404
            assert (await client.get("/api/v1/nodes/..%2F..%2Finfo")).status_code == 404

    rig(test)
