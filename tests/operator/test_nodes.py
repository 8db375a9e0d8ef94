"""Nodes: found, tagged, decided on, forgotten."""

from __future__ import annotations

import pytest


def names(answered):
    return [node["hostname"] for node in answered.json]


def test_nodes_are_listed_by_what_they_are(rig):
    async def test(box):
        await box.post("/api/v1/tenants", {"name": "blue"}, 201)
        await box.enroll("web", tags=("prod", "eu"))
        await box.enroll("db", tags=("prod",))
        await box.enroll("lab", "blue")
        assert names(await box.get("/api/v1/nodes")) == ["web", "db", "lab"]
        assert names(await box.get("/api/v1/nodes?tenant=blue")) == ["lab"]
        assert names(await box.get("/api/v1/nodes?tag=prod")) == ["web", "db"]
        assert names(await box.get("/api/v1/nodes?tag=eu&tag=us")) == ["web"]
        assert names(await box.get("/api/v1/nodes?platform=linux&node=db&node=lab")) == ["db", "lab"]
        assert names(await box.get("/api/v1/nodes?platform=darwin")) == []
        assert names(await box.get("/api/v1/nodes?status=pending&status=active")) == ["web", "db", "lab"]
        assert (await box.get("/api/v1/nodes?node=none", 404)).json["hint"] == "osqbox nodes"
        await box.get("/api/v1/nodes?tenant=none", 404)

    rig(test)


def test_a_node_is_shown_by_any_name_with_its_latest_sighting(rig):
    async def test(box):
        node = await box.enroll("web")
        box.clock.at += 5
        box.presence.heard(node.id, box.clock.at)
        for word in ("web", node.id, "nod"):
            shown = (await box.get(f"/api/v1/nodes/{word}")).json
            assert (shown["id"], shown["last_seen_at"]) == (node.id, "2023-11-14T22:13:25.000000Z")
        assert shown["host_details"]["os_version"]["platform"] == "ubuntu"
        await box.enroll("db")
        assert "fits 2 nodes" in (await box.get("/api/v1/nodes/nod", 400)).json["error"]
        await box.get("/api/v1/nodes/none", 404)

    rig(test)


def test_tags_are_replaced(rig):
    async def test(box):
        await box.enroll("web", tags=("old",))
        changed = (await box.patch("/api/v1/nodes/web", {"tags": ["a", "b", "a"]})).json
        assert changed["tags"] == ["a", "b"]
        for bad in ({}, {"tags": "a"}, {"tags": [""]}, {"tags": ["a"] * 101}):
            await box.patch("/api/v1/nodes/web", bad, 400)
        await box.patch("/api/v1/nodes/none", {"tags": []}, 404)

    rig(test)


def test_a_pending_node_is_approved(rig):
    async def test(box):
        await box.post("/api/v1/tenants", {"name": "blue", "approve": True}, 201)
        await box.enroll("web", "blue")
        assert names(await box.get("/api/v1/nodes?status=pending")) == ["web"]
        assert (await box.post("/api/v1/nodes/web/approve")).json["status"] == "active"

    rig(test)


@pytest.mark.parametrize("how", ["reject", "delete"])
def test_a_node_put_out_ends_its_targets_and_its_held_read(rig, how):
    async def test(box):
        node = await box.enroll("web")
        await box.post("/api/v1/campaigns", {"sql": "select 1", "nodes": ["web"]}, 201)
        held = box.presence.hold(node.id)
        if how == "reject":
            assert (await box.post("/api/v1/nodes/web/reject")).json["status"] == "rejected"
        else:
            assert (await box.delete("/api/v1/nodes/web")).json == {"deleted": node.id}
            await box.get("/api/v1/nodes/web", 404)
        assert held.is_set()
        assert node.id not in box.presence.seen()
        campaign = (await box.get("/api/v1/campaigns/latest")).json
        assert (campaign["summary"]["cancelled"], campaign["open"]) == (1, [])
        assert campaign["ended_at"] is not None

    rig(test)


def test_reenroll_revokes_the_key_and_wakes_the_agent(rig):
    async def test(box):
        node = await box.enroll("web")
        key = "SELECT key_digest FROM osquery_nodes"
        before, held = box.store.peek(lambda db: db.execute(key).fetchone()), box.presence.hold(node.id)
        assert (await box.post("/api/v1/nodes/web/reenroll")).json["status"] == "active"
        assert box.store.peek(lambda db: db.execute(key).fetchone()) != before
        assert held.is_set()

    rig(test)


@pytest.mark.parametrize("verb", ["approve", "reject", "reenroll"])
def test_a_verb_needs_a_node(rig, verb):
    async def test(box):
        await box.post(f"/api/v1/nodes/none/{verb}", status=404)

    rig(test)


def test_a_nodes_config_says_where_each_value_comes_from(rig):
    async def test(box):
        await box.enroll("web", tags=("prod",))
        everybody = {"schedule": {"a": {"query": "select 1", "interval": 10}}, "odd": 1}
        await box.put("/api/v1/configs/base", {"content": everybody})
        some = {"schedule": {"a": {"query": "select 2", "interval": 20}}}
        await box.put("/api/v1/configs/prod", {"content": some, "target": {"tags": ["prod"]}})
        shown = (await box.get("/api/v1/nodes/web/config")).json
        assert shown["config"]["schedule"]["a"] == {"query": "select 2", "interval": 20}
        explained = {each["key"]: each for each in shown["explain"]}
        query = explained["schedule.a.query"]
        assert (query["source"], query["version"], query["value"]) == ("prod", 1, "select 2")
        assert query["overrode"] == [{"source": "base", "version": 1, "value": "select 1"}]
        assert any("odd" in note for note in shown["notes"])
        await box.get("/api/v1/nodes/none/config", 404)

    rig(test)
