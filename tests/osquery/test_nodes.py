"""Enrollment and authentication: who gets in, as whom, and who is sent away."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox import tenants
from osqbox.errors import BadUsage, Refused
from osqbox.osquery import nodes
from osqbox.osquery.nodes import Selector, authenticate
from osqbox.tenants import TenantOptions

CERT = "osqbox://default/laptop-7"


def refused(call: Any, *args: Any, **named: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        call(*args, **named)
    return caught.value


def options(world: Any, **changes: Any) -> None:
    world.do(tenants.change, tenants.DEFAULT, TenantOptions(**changes))


# the secret


def test_a_host_enrolls_with_its_details(world: Any, kit: Any) -> None:
    enrolled = world.enroll(kit.host())
    (facts,) = nodes.facts_json(world.db, Selector())
    assert facts == {
        "id": enrolled.node.id,
        "tenant": "default",
        "hostname": "web-1.example",
        "host_identifier": "web-1",
        "platform": "ubuntu",
        "status": "active",
        "tags": [],
        "os": "Ubuntu 24.04",
        "osquery_version": "5.23.1",
        "hardware_uuid": "hardware-web-1",
        "instance_id": "instance-web-1",
        "address": "192.0.2.1",
        "certificate_name": None,
        "enrollments": 1,
        "enrolled_at": "2023-11-14T22:13:20.000000Z",
        "last_seen_at": "2023-11-14T22:13:20.000000Z",
        "host_details": kit.host()["host_details"],
    }
    assert authenticate(world.db, enrolled.node_key, kit.peer()) == enrolled.node
    assert world.events[-1].kind == "node_enrolled"


def test_the_documented_minimum_is_enough(world: Any, kit: Any) -> None:
    """The oldest agents send nothing but the secret."""
    enrolled = world.enroll({"enroll_secret": kit.SECRET})
    assert enrolled.node.hostname == "unknown"
    assert (
        world.enroll({"enroll_secret": kit.SECRET, "platform_type": 21, "host_identifier": "m"}).node.platform
        == "darwin"
    )


@pytest.mark.parametrize(
    "members",
    [{"host_identifier": 1.5}, {"host_identifier": ["x"]}, {"platform_type": True}, {"host_details": [1]}],
)
def test_members_of_wrong_types_are_refused(world: Any, kit: Any, members: dict[str, Any]) -> None:
    assert refused(world.enroll, kit.host(**members)).reason == "wrong_type"


@given(st.text(max_size=20))
def test_any_platform_type_is_survived(text: str) -> None:
    assert nodes._platform(text) in ("", "windows", "darwin", "freebsd", "linux")


def test_long_members_are_cut(world: Any, kit: Any) -> None:
    """A host name goes into every target and event."""
    details = {"system_info": {"hostname": "x" * 100_000}}
    node = world.enroll(kit.host("y" * 100_000, host_details=details)).node
    assert len(node.hostname) <= 4096
    assert len(node.host_identifier) <= 1024


@pytest.mark.parametrize("name", ["enroll_secret", "renamed_secret"])
def test_the_secret_may_be_renamed_in_the_body(world: Any, kit: Any, name: str) -> None:
    body = kit.host()
    del body["enroll_secret"]
    assert world.enroll({**body, name: kit.SECRET}).node.status == "active"


def test_the_secret_may_stand_in_the_uri(world: Any, kit: Any) -> None:
    assert world.enroll(kit.host(enroll_secret=""), uri=("nonsense", kit.SECRET)).node.tenant == "default"


@pytest.mark.parametrize("secret", ["wrong", "", None])
def test_without_the_right_secret_nobody_enrolls(world: Any, kit: Any, secret: Any) -> None:
    error = refused(world.enroll, kit.host(enroll_secret=secret))
    assert error.node_invalid
    assert error.reason == ("wrong_secret" if secret else "secret_missing")
    assert world.count("osquery_nodes") == 0
    assert "wrong" not in error.message


def test_a_secret_chooses_tenant_and_tags(world: Any, kit: Any) -> None:
    """A tenant may have several."""
    world.do(tenants.create, "acme", TenantOptions())
    world.do(tenants.add_secret, "acme", "s-web", tags=("web", "eu"))
    world.do(tenants.add_secret, "acme", "s-db", tags=("db",))
    web = world.enroll(kit.host("w", enroll_secret="s-web")).node
    db = world.enroll(kit.host("d", enroll_secret="s-db")).node
    assert (web.tenant, web.tags) == ("acme", ("web", "eu"))
    assert (db.tenant, db.tags) == ("acme", ("db",))


def test_an_expired_or_used_up_secret_enrolls_nobody(world: Any, kit: Any) -> None:
    world.do(tenants.add_secret, "default", "short", expires_at=world.now + 5)
    world.do(tenants.add_secret, "default", "once", uses=1)
    world.node("a", enroll_secret="short")
    world.node("b", enroll_secret="once")
    world.now += 5
    for secret in ("short", "once"):
        error = refused(world.enroll, kit.host("c", enroll_secret=secret))
        assert (error.reason, error.node_invalid) == ("secret_unusable", True)
    assert world.count("osquery_nodes") == 2


def test_a_refused_enrollment_uses_no_use(world: Any, kit: Any) -> None:
    options(world, reenroll="refuse")
    world.do(tenants.add_secret, "default", "twice", uses=2)
    world.node("a", enroll_secret="twice")
    world.now += 100
    assert refused(world.enroll, kit.host("a", enroll_secret="twice")).reason == "already_enrolled"
    world.node("b", enroll_secret="twice")


def test_the_secret_of_a_closed_tenant_enrolls_nobody(world: Any, kit: Any) -> None:
    world.do(tenants.create, "acme", TenantOptions())
    world.do(tenants.add_secret, "acme", "s")
    key = world.enroll(kit.host(enroll_secret="s")).node_key
    world.do(tenants.close, "acme")
    assert refused(world.enroll, kit.host("b", enroll_secret="s")).reason == "tenant_closed"
    error = refused(authenticate, world.db, key, kit.peer())
    assert (error.reason, error.node_invalid) == ("tenant_closed", True)


def test_an_open_tenant_needs_no_secret_but_takes_no_wrong_one(world: Any, kit: Any) -> None:
    options(world, open=True)
    assert world.enroll(kit.host("a", enroll_secret="")).node.status == "active"
    assert refused(world.enroll, kit.host("b", enroll_secret="wrong")).reason == "wrong_secret"


# enrolling again


@pytest.mark.parametrize("changed", ["host_identifier", "instance_id", "hardware"])
def test_enrolling_again_makes_no_second_host(world: Any, kit: Any, changed: str) -> None:
    """Renamed, with a new osquery database, or with an unknown board: it is the same machine, with a new key."""
    first = world.enroll(kit.host())
    again = kit.host()
    if changed == "host_identifier":
        again["host_identifier"] = "renamed"
        again["host_details"]["system_info"]["hostname"] = "renamed"
    elif changed == "instance_id":
        again["host_details"]["osquery_info"]["instance_id"] = "another"
    else:
        again["host_details"]["osquery_info"]["instance_id"] = "another"
        del again["host_details"]["system_info"]["uuid"]
    world.now += 1000
    second = world.enroll(again)
    assert second.node.id == first.node.id
    assert world.count("osquery_nodes", "enrollments = 2") == world.count("osquery_nodes") == 1
    assert authenticate(world.db, second.node_key, kit.peer()).id == first.node.id
    assert refused(authenticate, world.db, first.node_key, kit.peer()).node_invalid
    assert world.events[-1].data["again"] is True


def test_two_machines_of_one_name_are_two_hosts(world: Any, kit: Any) -> None:
    world.enroll(kit.host())
    twin = kit.host()
    twin["host_details"] = kit.host("twin")["host_details"]
    world.enroll(twin)
    assert world.count("osquery_nodes") == 2


def test_the_same_host_in_two_tenants_is_two_nodes(world: Any, kit: Any) -> None:
    world.do(tenants.create, "acme", TenantOptions())
    world.do(tenants.add_secret, "acme", "s")
    one, other = world.node(), world.node(enroll_secret="s")
    assert one.id != other.id


def test_tags_survive_enrolling_again(world: Any, kit: Any) -> None:
    world.do(tenants.add_secret, "default", "tagged", tags=("eu",))
    node = world.node()
    world.do(nodes.set_tags, node.id, ["mine", "mine"])
    assert world.node(enroll_secret="tagged").tags == ("mine", "eu")


def test_a_repeated_enrollment_whose_answer_got_lost_counts_once(world: Any, kit: Any) -> None:
    """Byte for byte the same within a minute: neither uses the secret again nor is it refused as a second one."""
    options(world, reenroll="refuse")
    world.do(tenants.add_secret, "default", "once", uses=1)
    first = world.enroll(kit.host(enroll_secret="once"))
    world.now += 10
    second = world.enroll(kit.host(enroll_secret="once"))
    assert second.node.id == first.node.id
    world.now += 61
    assert refused(world.enroll, kit.host(enroll_secret="once")).reason == "secret_unusable"


def test_a_deleted_host_is_told_and_enrolls_as_a_new_one(world: Any, kit: Any) -> None:
    first = world.enroll()
    world.do(nodes.delete, first.node.id)
    error = refused(authenticate, world.db, first.node_key, kit.peer())
    assert (error.reason, error.node_invalid) == ("node_key_unknown", True)
    second = world.enroll()
    assert second.node.id != first.node.id
    assert world.count("osquery_nodes") == 1


def test_a_revoked_key_makes_the_host_enroll_again_as_itself(world: Any, kit: Any) -> None:
    first = world.enroll()
    world.do(nodes.revoke_key, first.node.id)
    assert refused(authenticate, world.db, first.node_key, kit.peer()).node_invalid
    assert world.enroll().node.id == first.node.id


# approval


def test_a_node_waits_for_approval_and_keeps_its_key_meanwhile(world: Any, kit: Any) -> None:
    options(world, approve=True)
    enrolled = world.enroll()
    assert enrolled.node.status == "pending"
    error = refused(authenticate, world.db, enrolled.node_key, kit.peer())
    assert (error.reason, error.node_invalid) == ("approval_pending", False)
    world.do(nodes.decide, enrolled.node.id, "active")
    assert authenticate(world.db, enrolled.node_key, kit.peer()).status == "active"
    assert world.enroll().node.status == "active"


def test_a_rejected_node_neither_asks_nor_enrolls(world: Any, kit: Any) -> None:
    enrolled = world.enroll()
    world.do(nodes.decide, enrolled.node.id, "rejected")
    assert refused(authenticate, world.db, enrolled.node_key, kit.peer()).reason == "rejected"
    assert refused(world.enroll).reason == "rejected"
    assert [kind for kind in world.kinds() if kind.startswith("node_")] == ["node_enrolled", "node_rejected"]


# client certificates


def test_a_certificate_enrolls_and_is_then_required(world: Any, kit: Any) -> None:
    options(world, client_cert=True)
    enrolled = world.enroll(kit.host(enroll_secret=""), kit.peer(certificate=CERT))
    assert enrolled.node_key
    assert authenticate(world.db, enrolled.node_key, kit.peer(certificate=CERT)).id == enrolled.node.id
    for other in (kit.peer(), kit.peer(certificate="osqbox://default/other")):
        error = refused(authenticate, world.db, enrolled.node_key, other)
        assert (error.reason, error.node_invalid) == ("certificate_required", False)


def test_a_certificate_alone_enrolls_only_where_the_tenant_says_so(world: Any, kit: Any) -> None:
    world.do(tenants.create, "acme", TenantOptions(client_cert=True))
    body = kit.host(enroll_secret="")
    assert refused(world.enroll, body, kit.peer(certificate=CERT)).reason == "secret_missing"
    assert refused(world.enroll, body, kit.peer(certificate="x", tenant="nobody")).reason == "secret_missing"
    assert refused(world.enroll, body, kit.peer()).reason == "secret_missing"
    assert world.enroll(body, kit.peer(certificate="osqbox://acme/a", tenant="acme")).node.tenant == "acme"
    world.do(tenants.close, "acme")
    assert refused(world.enroll, body, kit.peer(certificate="osqbox://acme/a", tenant="acme")).node_invalid


def test_blank_keys_are_handed_out_on_request_only(world: Any, kit: Any) -> None:
    options(world, client_cert=True)
    assert world.enroll(kit.host("a", enroll_secret=""), kit.peer(certificate="a")).node_key != ""
    options(world, client_cert=True, blank_keys=True)
    assert world.enroll(kit.host("b", enroll_secret=""), kit.peer(certificate="b")).node_key == ""
    assert world.enroll(kit.host("c"), kit.peer(certificate="c")).node_key != "", "enrolled by secret"


@pytest.mark.parametrize("blank_keys", [True, False])
def test_a_blank_key_is_accepted_with_the_certificate_it_belongs_to(world: Any, kit: Any, blank_keys: bool) -> None:
    options(world, client_cert=True, blank_keys=blank_keys)
    node = world.enroll(kit.host(enroll_secret=""), kit.peer(certificate=CERT)).node
    assert authenticate(world.db, "", kit.peer(certificate=CERT)).id == node.id
    for other in (kit.peer(), kit.peer(certificate="osqbox://default/other")):
        error = refused(authenticate, world.db, "", other)
        assert (error.reason, error.node_invalid) == ("node_key_missing", True)
    world.do(nodes.revoke_key, node.id)
    assert refused(authenticate, world.db, "", kit.peer(certificate=CERT)).node_invalid
    assert world.enroll(kit.host(enroll_secret=""), kit.peer(certificate=CERT)).node.id == node.id
    assert authenticate(world.db, "", kit.peer(certificate=CERT)).id == node.id


def test_a_blank_key_names_nobody_when_two_hosts_share_a_certificate(world: Any, kit: Any) -> None:
    options(world, client_cert=True, blank_keys=True)
    for name in ("a", "b"):
        world.enroll(kit.host(name, enroll_secret=""), kit.peer(certificate=CERT))
    assert refused(authenticate, world.db, "", kit.peer(certificate=CERT)).reason == "node_key_missing"


def test_a_blank_key_is_nobody_without_certificates(world: Any, kit: Any) -> None:
    world.enroll()
    assert refused(authenticate, world.db, "", kit.peer()).node_invalid
    assert refused(authenticate, world.db, "", kit.peer(certificate=CERT)).node_invalid


@pytest.mark.parametrize("changes", [{"open": True}, {"client_cert": True}])
def test_a_host_with_a_certificate_enrolls_again_as_itself(world: Any, kit: Any, changes: dict[str, bool]) -> None:
    """Also where the certificate is not what lets it in."""
    options(world, **changes)
    for _ in range(3):
        world.now += 100
        world.enroll(kit.host(enroll_secret=""), kit.peer(certificate=CERT))
    assert world.count("osquery_nodes") == 1


def test_a_certificate_does_not_take_over_a_host_that_enrolled_by_secret(world: Any, kit: Any) -> None:
    by_secret = world.enroll(kit.host())
    options(world, client_cert=True)
    by_certificate = world.enroll(kit.host(enroll_secret=""), kit.peer(certificate=CERT))
    assert by_certificate.node.id != by_secret.node.id
    assert authenticate(world.db, by_secret.node_key, kit.peer()).id == by_secret.node.id


def test_a_secret_does_not_take_over_a_host_that_enrolled_by_certificate(world: Any, kit: Any) -> None:
    """... and so take the certificate off it, knowing no more than its name."""
    options(world, client_cert=True)
    by_certificate = world.enroll(kit.host(enroll_secret=""), kit.peer(certificate=CERT))
    impostor = kit.host(host_details={})
    assert world.enroll(impostor).node.id != by_certificate.node.id
    assert world.enroll(kit.host()).node.id != by_certificate.node.id
    assert authenticate(world.db, by_certificate.node_key, kit.peer(certificate=CERT)).certificate_name == CERT


def test_a_certificate_binds_only_where_it_lets_in(world: Any, kit: Any) -> None:
    options(world, open=True)
    enrolled = world.enroll(kit.host(enroll_secret=""), kit.peer(certificate=CERT))
    assert authenticate(world.db, enrolled.node_key, kit.peer()).certificate_name is None
    by_secret = world.enroll(kit.host("b"), kit.peer(certificate=CERT))
    assert authenticate(world.db, by_secret.node_key, kit.peer()).certificate_name is None


# keys and secrets


def test_a_secret_beside_the_key_must_be_of_the_same_tenant(world: Any, kit: Any) -> None:
    """--tls_secret_always sends it along; what is no secret at all does not matter."""
    world.do(tenants.create, "acme", TenantOptions())
    world.do(tenants.add_secret, "acme", "foreign")
    key = world.enroll().node_key
    assert authenticate(world.db, key, kit.peer(), [kit.SECRET]).tenant == "default"
    assert authenticate(world.db, key, kit.peer(), ["whatever"]).tenant == "default"
    error = refused(authenticate, world.db, key, kit.peer(), ["foreign"])
    assert (error.reason, error.node_invalid) == ("foreign_secret", True)


def test_no_key_and_no_secret_is_kept_in_the_clear(world: Any, kit: Any) -> None:
    key = world.enroll().node_key
    dump = "\n".join(world.db.iterdump())
    assert kit.SECRET not in dump
    assert f"'{key}'" not in dump
    assert kit.SECRET not in str(world.events)


# finding


def test_nodes_are_found_by_id_name_identifier_and_beginning(world: Any, kit: Any) -> None:
    first, second = world.node("web-1"), world.node("web-2")
    for word in (first.id, "web-1", "web-1.example"):
        assert nodes.resolve(world.db, word).id == first.id
        assert nodes.resolve(world.db, word, "default").id == first.id
    with pytest.raises(BadUsage, match="no node called"):
        nodes.resolve(world.db, "nobody")
    with pytest.raises(BadUsage, match="fits 2 nodes"):
        nodes.resolve(world.db, "id-")
    world.do(tenants.create, "acme", TenantOptions())
    with pytest.raises(BadUsage, match="no node called"):
        nodes.resolve(world.db, second.id, "acme")


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        (Selector(), ["a", "m", "w"]),
        (Selector(tags=("web", "none")), ["a"]),
        (Selector(platforms=("linux",)), ["a"]),
        (Selector(platforms=("ubuntu",)), ["a"]),
        (Selector(platforms=("debian",)), ["a"]),
        (Selector(platforms=("darwin", "windows")), ["m", "w"]),
        (Selector(nodes=("m", "a")), ["a", "m"]),
        (Selector(nodes=("m", "a"), platforms=("darwin",)), ["m"]),
        (Selector(tenant="default"), ["a", "m", "w"]),
        (Selector(tenant="acme"), []),
        (Selector(statuses=("pending",)), []),
    ],
)
def test_a_selector_joins_kinds_by_and(world: Any, kit: Any, selector: Selector, found: list[str]) -> None:
    world.do(tenants.create, "acme", TenantOptions())
    world.do(nodes.set_tags, world.node("a").id, ["web"])
    world.node("m", host_details={}, platform_type="21")
    world.node("w", host_details={}, platform_type="2")
    assert [node.host_identifier for node in nodes.select(world.db, selector)] == found


def test_a_selector_of_nobody_is_an_error(world: Any) -> None:
    for selector in (Selector(nodes=("nobody",)), Selector(tenant="nobody")):
        with pytest.raises(BadUsage):
            nodes.select(world.db, selector)


# sightings and repeated bodies


def test_sightings_never_go_back(world: Any) -> None:
    node = world.node()
    world.do(nodes.save_seen, {node.id: (world.now + 50, 10.5)})
    world.do(nodes.save_seen, {node.id: (world.now + 20, None), "nobody": (1.0, None)})
    assert nodes.sightings(world.db) == [(node.id, world.now + 50, 10.5)]
    (facts,) = nodes.facts_json(world.db, Selector(), seen={node.id: world.now + 60})
    assert facts["last_seen_at"] == "2023-11-14T22:14:20.000000Z"


def repeated(world: Any, node: Any, body: bytes, connection: str, kind: str = "log:result") -> bool:
    found: bool = world.do(nodes.is_repeated, node.id, kind, body, connection)
    return found


def test_a_body_is_repeated_on_another_connection_within_a_minute(world: Any) -> None:
    node, other = world.node("a"), world.node("b")
    assert not repeated(world, node, b"x", "c1")
    assert not repeated(world, node, b"x", "c1"), "the same connection: meant so"
    assert repeated(world, node, b"x", "c2")
    assert repeated(world, node, b"x", "c3")
    assert not repeated(world, node, b"x", "c2", "log:status"), "another kind"
    assert not repeated(world, other, b"x", "c2"), "another node"
    world.now += 61
    assert not repeated(world, node, b"x", "c2"), "too late"


def test_only_the_previous_body_can_be_repeated(world: Any) -> None:
    node = world.node()
    assert not repeated(world, node, b"x", "c1")
    assert not repeated(world, node, b"y", "c1")
    assert not repeated(world, node, b"x", "c2")


def test_what_is_remembered_of_a_node_goes_with_it(world: Any) -> None:
    node = world.node()
    repeated(world, node, b"x", "c1")
    world.do(nodes.delete, node.id)
    assert world.count("osquery_last_bodies") == 0
    assert json.dumps(world.kinds()[-1]) == '"node_deleted"'
