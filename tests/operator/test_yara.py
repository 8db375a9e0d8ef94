"""YARA rules."""

from __future__ import annotations

from osqbox.osquery import yara

TEXT = {"Content-Type": "text/plain; charset=utf-8"}
RULE = "rule a { condition: true } // ü"


def test_rules_are_kept_and_deleted(rig):
    async def test(box):
        node = await box.enroll("web")

        async def put(path, status=200, data=RULE, headers=TEXT):
            return await box.call("PUT", path, status=status, data=data, headers=headers)

        assert (await put("/api/v1/yara/a.yar")).json == {"name": "a.yar", "tenant": "default", "public": False}
        assert box.store.peek(lambda db: yara.rule_for(db, "a.yar", node)) == RULE
        (listed,) = (await box.get("/api/v1/yara")).json
        assert (listed["name"], listed["bytes"], listed["public"]) == ("a.yar", len(RULE), False)
        assert (await put("/api/v1/yara/a.yar?public=1")).json["public"] is True
        assert (await box.get("/api/v1/yara?tenant=default")).json[0]["public"] is True
        assert (await box.get("/api/v1/yara?tenant=blue")).json == []
        await put("/api/v1/yara/a.yar?tenant=none", 404)
        await put("/api/v1/yara/-a", 400)
        await put("/api/v1/yara/a.yar", 400, b"\xff")
        await put("/api/v1/yara/a.yar", 415, b"{}", {"Content-Type": "application/json"})
        await box.post("/api/v1/tenants", {"name": "blue"}, 201)
        await put("/api/v1/yara/a.yar?tenant=blue&public=1", 409)
        assert (await box.delete("/api/v1/yara/a.yar")).json == {"deleted": "a.yar", "tenant": "default"}
        await box.delete("/api/v1/yara/a.yar?tenant=default", 404)

    rig(test)
