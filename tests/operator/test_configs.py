"""Config sources: checked, versioned, rolled back."""

from __future__ import annotations

GOOD = {"schedule": {"a": {"query": "select pid from processes", "interval": 10}}}
BAD_SQL = {"schedule": {"a": {"query": "select pid from proceses", "interval": 10}}}
BAD = {"schedule": {"a": {"query": "select 1", "interval": "often"}}}


def test_a_source_gets_versions(rig):
    async def test(box):
        put = (await box.put("/api/v1/configs/base", {"content": GOOD, "note": "first"})).json
        assert put == {"name": "base", "version": 1, "problems": []}
        assert (await box.put("/api/v1/configs/base", {"content": GOOD})).json["version"] == 1
        changed = {**GOOD, "options": {"host_identifier": "uuid"}}
        assert (await box.put("/api/v1/configs/base", {"content": changed, "priority": 3})).json["version"] == 2
        (listed,) = (await box.get("/api/v1/configs")).json
        assert (listed["name"], listed["version"], listed["priority"], listed["origin"]) == ("base", 2, 3, "api")
        versions = (await box.get("/api/v1/configs/base")).json
        assert [(each["version"], each["current"]) for each in versions] == [(2, True), (1, False)]
        assert (versions[1]["content"], versions[1]["note"]) == (GOOD, "first")
        await box.get("/api/v1/configs/none", 404)

    rig(test)


def test_a_source_is_removed_and_rolled_back(rig):
    async def test(box):
        await box.put("/api/v1/configs/base", {"content": GOOD})
        await box.put("/api/v1/configs/base", {"content": {"options": {}}})
        assert (await box.delete("/api/v1/configs/base")).json == {"deleted": "base"}
        assert (await box.get("/api/v1/configs")).json[0]["removed"] is True
        assert (await box.post("/api/v1/configs/base/rollback")).json == {"name": "base", "version": 4}
        assert (await box.post("/api/v1/configs/base/rollback", {"to": 1})).json["version"] == 5
        assert (await box.get("/api/v1/configs/base")).json[0]["content"] == GOOD
        assert (await box.post("/api/v1/configs/base/rollback", {"to": 77}, 404)).json["reason"] == "not_found"
        await box.post("/api/v1/configs/none/rollback", status=404)
        await box.delete("/api/v1/configs/none", 404)

    rig(test)


def test_errors_are_refused_with_where_and_what(rig):
    async def test(box):
        refused = (await box.put("/api/v1/configs/base", {"content": BAD_SQL}, 400)).json
        assert refused["reason"] == "bad_config"
        (problem,) = refused["problems"]
        assert (problem["path"], problem["severity"]) == ("schedule.a.query", "error")
        assert "proceses" in problem["message"]
        assert (await box.get("/api/v1/configs")).json == []

    rig(test)


def test_force_skips_errors_of_sql_only(rig):
    async def test(box):
        forced = (await box.put("/api/v1/configs/base?force=1", {"content": BAD_SQL})).json
        assert forced["version"] == 1
        assert [problem["severity"] for problem in forced["problems"]] == ["error"]
        await box.put("/api/v1/configs/base?force=1", {"content": BAD}, 400)

    rig(test)


def test_validate_stores_nothing(rig):
    async def test(box):
        assert (await box.post("/api/v1/configs/validate", {"content": GOOD})).json == {"problems": []}
        found = (await box.post("/api/v1/configs/validate", {"content": {**BAD_SQL, "odd": 1}})).json["problems"]
        assert {(each["path"], each["severity"]) for each in found} == {
            ("schedule.a.query", "error"),
            ("odd", "warning"),
        }
        assert (await box.get("/api/v1/configs")).json == []

    rig(test)


def test_the_target_may_stand_in_the_content_or_beside_it(rig):
    async def test(box):
        inside = {**GOOD, "osqbox": {"target": {"tags": ["a"]}, "priority": 2}}
        await box.put("/api/v1/configs/one", {"content": inside})
        await box.put("/api/v1/configs/two", {"content": inside, "target": {"platforms": ["linux"]}, "priority": 0})
        one, two = (await box.get("/api/v1/configs")).json
        assert (one["target"]["tags"], one["priority"]) == (["a"], 2)
        assert (two["target"]["tags"], two["target"]["platforms"], two["priority"]) == ([], ["linux"], 0)
        assert "osqbox" not in (await box.get("/api/v1/configs/one")).json[0]["content"]
        for bad in ({"tags": []}, {"tag": ["a"]}, {"tags": "a"}, None):
            await box.put("/api/v1/configs/three", {"content": GOOD, "target": bad}, 400)
        await box.put("/api/v1/configs/three", {"content": {**GOOD, "osqbox": []}, "priority": 1}, 400)

    rig(test)


def test_depth_and_size_are_bounded(rig):
    async def test(box):
        deep = current = {}
        for _ in range(40):
            current["a"] = current = {}
        await box.put("/api/v1/configs/base", {"content": {"views": deep}}, 400)
        large = {"content": {"views": {"a": "x" * (5 << 20)}}}
        await box.put("/api/v1/configs/base", large, 400)
        await box.put("/api/v1/configs/" + "n" * 201, {"content": GOOD}, 400)

    rig(test)


def test_a_source_of_a_file_is_not_taken_over(rig):
    async def test(box):
        from osqbox.osquery import configs
        from osqbox.osquery.amalgamate import Source

        await box.store.write(lambda tx: configs.put(tx, Source("base", GOOD, origin="file"), "loaded"))
        refused = await box.put("/api/v1/configs/base", {"content": {"options": {}}}, 409)
        assert refused.json["reason"] == "conflict"

    rig(test)
