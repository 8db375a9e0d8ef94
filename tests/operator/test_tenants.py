"""Tenants and enroll secrets."""

from __future__ import annotations

from osqbox import tenants


def test_a_tenant_is_created_with_a_secret_shown_once(rig):
    async def test(box):
        box.clock.at += 1
        made = (await box.post("/api/v1/tenants", {"name": "blue", "approve": True}, 201)).json
        assert (made["name"], made["approve"], made["open"], made["closed_at"]) == ("blue", True, False, None)
        found = box.store.peek(lambda db: tenants.find_secret(db, [made["enroll_secret"]]))
        assert found is not None
        assert found.tenant == "blue"
        shown = (await box.get("/api/v1/tenants/blue")).json
        assert shown == {name: value for name, value in made.items() if name != "enroll_secret"}
        assert [each["name"] for each in (await box.get("/api/v1/tenants")).json] == ["default", "blue"]
        kinds = [each.kind for each in events(box)]
        assert kinds[-2:] == ["tenant_created", "secret_added"]

    rig(test)


def events(box):
    from osqbox import feed

    return box.store.peek(lambda db: feed.events_after(db, 0))


def test_a_given_secret_is_kept(rig):
    async def test(box):
        made = (await box.post("/api/v1/tenants", {"name": "blue", "enroll_secret": "opensesame"}, 201)).json
        assert made["enroll_secret"] == "opensesame"

    rig(test)


def test_names_and_secrets_are_not_given_twice(rig):
    async def test(box):
        await box.post("/api/v1/tenants", {"name": "blue", "enroll_secret": "opensesame"}, 201)
        again = await box.post("/api/v1/tenants", {"name": "blue"}, 409)
        assert again.json["reason"] == "conflict"
        await box.post("/api/v1/tenants", {"name": "red", "enroll_secret": "opensesame"}, 409)
        await box.get("/api/v1/tenants/red", 404)
        await box.post("/api/v1/tenants/default/secrets", {"secret": "opensesame"}, 409)

    rig(test)


def test_options_change_one_by_one(rig):
    async def test(box):
        await box.post("/api/v1/tenants", {"name": "blue", "client_cert": True, "reenroll": "refuse"}, 201)
        changed = (await box.patch("/api/v1/tenants/blue", {"open": True, "client_cert": False})).json
        assert (changed["open"], changed["client_cert"], changed["reenroll"]) == (True, False, "refuse")
        await box.patch("/api/v1/tenants/blue", {"reenroll": "sometimes"}, 400)
        await box.patch("/api/v1/tenants/blue", {"name": "red"}, 400)
        await box.patch("/api/v1/tenants/none", {}, 404)

    rig(test)


def test_closing_cancels_what_is_open_and_wakes_held_reads(rig):
    async def test(box):
        await box.post("/api/v1/tenants", {"name": "blue"}, 201)
        node = await box.enroll("web", "blue")
        await box.post("/api/v1/campaigns", {"sql": "select 1", "tenant": "blue"}, 201)
        held = box.presence.hold(node.id)
        held_before = held.is_set()
        assert (await box.delete("/api/v1/tenants/blue")).json == {"closed": "blue"}
        assert (held_before, held.is_set()) == (False, True)
        assert (await box.get("/api/v1/tenants/blue")).json["closed_at"] is not None
        summary = (await box.get("/api/v1/campaigns/latest")).json["summary"]
        assert (summary["cancelled"], summary["open"]) == (1, 0)
        await box.delete("/api/v1/tenants/default", 400)
        await box.delete("/api/v1/tenants/none", 404)

    rig(test)


def test_secrets_come_and_go(rig):
    async def test(box):
        body = {"label": "laptops", "tags": ["laptop"], "expires_in_s": 60, "uses": 2}
        added = (await box.post("/api/v1/tenants/default/secrets", body, 201)).json
        secret = added.pop("enroll_secret")
        assert secret
        assert added["expires_at"] == "2023-11-14T22:14:20.000000Z"
        assert (added["tags"], added["uses_left"], added["label"]) == (["laptop"], 2, "laptops")
        assert (await box.get("/api/v1/tenants/default/secrets")).json == [added]
        await box.delete(f"/api/v1/tenants/default/secrets/{added['id']}")
        assert (await box.get("/api/v1/tenants/default/secrets")).json == []
        await box.delete(f"/api/v1/tenants/default/secrets/{added['id']}", 404)
        await box.delete("/api/v1/tenants/default/secrets/first", 400)
        await box.get("/api/v1/tenants/none/secrets", 404)
        await box.post("/api/v1/tenants/none/secrets", {}, 404)
        for bad in ({"uses": 0}, {"expires_in_s": 0}, {"expires_in_s": 1e300}, {"secret": "x" * 1025}):
            await box.post("/api/v1/tenants/default/secrets", bad, 400)

    rig(test)
