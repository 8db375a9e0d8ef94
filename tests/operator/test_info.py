"""Probes, facts, metrics, stop."""

from __future__ import annotations

import re


def test_probes_need_no_token(rig):
    async def test(box):
        assert (await box.ask("GET", "/livez")).json == {"live": True}
        ready = await box.ask("GET", "/readyz")
        assert (ready.status, ready.json) == (200, {"ready": True, "stopping": False})

    rig(test)


def test_stop_asks_the_box_and_readiness_follows(rig):
    async def test(box):
        assert (await box.post("/api/v1/stop", status=202)).json == {"stopping": True}
        assert box.stops == ["stop"]
        unready = await box.get("/readyz", 503)
        assert unready.json == {"ready": False, "stopping": True}

    rig(test)


def test_info_has_the_facts_and_no_secret(rig):
    async def test(box):
        info = (await box.get("/api/v1/info")).json
        assert info["pid"] == 1
        assert info["statistics"]["store"]["commits"] >= 1
        assert isinstance(info["data"], str)
        assert not {"token", "enroll_secret"} & set(info)

    rig(test)


def parse(text: str) -> dict[str, float]:
    """A metrics text, each line checked against the format."""
    samples: dict[str, float] = {}
    described: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            described.add(line.split()[2])
        elif not line.startswith("# HELP "):
            name, labels, value = re.fullmatch(
                r'([a-z_][a-z0-9_]*)((?:\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})?) (\S+)', line
            ).groups()
            assert name in described
            samples[name + labels] = float(value)
    return samples


def test_metrics_count_what_happened(rig):
    async def test(box):
        node = await box.enroll("web")
        await box.send_log(node, {"name": "a", "action": "added"}, {"name": "b", "action": "added"})
        await box.post("/api/v1/campaigns", {"sql": "select 1", "nodes": ["web"]}, 201)
        box.parts.osquery.requests["config"] += 3
        box.parts.osquery.refused["wrong_secret"] += 1
        held = box.presence.hold(node.id)
        answered = await box.get("/metrics")
        box.presence.release(node.id, held)
        assert answered.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        samples = parse(answered.body.decode())
        assert samples['osqbox_nodes{status="active"}'] == 1
        assert samples['osqbox_nodes{status="pending"}'] == 0
        assert samples['osqbox_requests_total{operation="config"}'] == 3
        assert samples['osqbox_refused_total{reason="wrong_secret"}'] == 1
        assert samples["osqbox_log_lines_total"] == 2
        assert samples["osqbox_open_campaigns"] == 1
        assert samples["osqbox_held_reads"] == 1
        assert samples["osqbox_store_commits_total"] >= 3
        assert samples["osqbox_feed_events_total"] >= 3
        assert samples["process_resident_memory_bytes"] > 1_000_000
        assert samples['osqbox_listener_accepted_total{listener="operator"}'] == 3
        assert samples['osqbox_listener_refused_total{listener="operator",reason="a \\"quoted\\" reason"}'] == 1

    rig(test)
