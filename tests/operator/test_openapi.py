"""The document describes every route, and is OpenAPI."""

from __future__ import annotations

import re
from typing import Any

KINDS = {"string", "integer", "number", "boolean", "array", "object", "null"}


def test_every_route_is_described(rig):
    async def test(box):
        document = (await box.get("/api/v1/openapi.json")).json
        described = {
            (method.upper(), path): operation
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        }
        routes = {
            (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
            for rule in box.app.url_map.iter_rules()
            if not rule.endpoint.startswith("pages.")
            for method in rule.methods - {"HEAD"}
        }
        assert described.keys() == routes
        for (method, path), operation in described.items():
            assert operation["summary"], path
            assert any(code.startswith("2") for code in operation["responses"]), path
            assert operation["responses"]["default"]["content"]["application/json"]["schema"] == FAILURE
            named = {each["name"] for each in operation["parameters"] if each["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
            if method in ("PUT", "PATCH"):
                assert operation["requestBody"]["required"] or path.endswith("}"), path
        open_paths = {path for (_, path), operation in described.items() if operation.get("security") == []}
        assert open_paths == {"/livez", "/readyz"}

    rig(test)


FAILURE = {"$ref": "#/components/schemas/Failure"}


def test_the_structure_is_openapi_3_1(rig):
    async def test(box):
        document = (await box.get("/api/v1/openapi.json")).json
        assert document["openapi"] == "3.1.0"
        assert set(document["info"]) >= {"title", "version"}
        assert document["security"] == [{"token": []}]
        assert document["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}
        identifiers = []
        for methods in document["paths"].values():
            for operation in methods.values():
                identifiers.append(operation["operationId"])
                for parameter in operation["parameters"]:
                    assert parameter["in"] in ("path", "query")
                    check_schema(document, parameter["schema"])
                for content in [operation.get("requestBody", {"content": {}}), *operation["responses"].values()]:
                    for kind, media in content["content"].items():
                        assert re.fullmatch(r"[a-z]+/[a-z0-9.+-]+", kind)
                        check_schema(document, media["schema"])
                assert all(response["description"] for response in operation["responses"].values())
        assert len(set(identifiers)) == len(identifiers)
        for schema in document["components"]["schemas"].values():
            check_schema(document, schema)

    rig(test)


def check_schema(document: dict[str, Any], schema: dict[str, Any]) -> None:
    if "$ref" in schema:
        assert schema["$ref"].removeprefix("#/components/schemas/") in document["components"]["schemas"]
    kind = schema.get("type")
    assert kind is None or kind in KINDS
    assert set(schema.get("required", ())) <= set(schema.get("properties", {}))
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
    inner += [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    for each in inner:
        check_schema(document, each)


def test_shapes_are_told_apart(rig):
    async def test(box):
        document = (await box.get("/api/v1/openapi.json")).json
        paths, schemas = document["paths"], document["components"]["schemas"]
        created = paths["/api/v1/tenants"]["post"]
        assert created["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/NewTenant")
        assert created["responses"]["201"]["content"]["application/json"]["schema"]["$ref"].endswith("/CreatedTenant")
        assert schemas["NewTenant"]["required"] == ["name"]
        assert "enroll_secret" in schemas["CreatedTenant"]["required"]
        nodes = paths["/api/v1/nodes"]["get"]
        assert {each["name"] for each in nodes["parameters"]} == {"tenant", "tag", "platform", "status", "node"}
        tag = next(each for each in nodes["parameters"] if each["name"] == "tag")
        assert (tag["schema"]["type"], tag["schema"]["items"]["type"]) == ("array", "string")
        listed = nodes["responses"]["200"]["content"]["application/json"]["schema"]
        assert listed == {"type": "array", "items": {"$ref": "#/components/schemas/NodeFacts"}}
        stream = paths["/api/v1/stream"]["get"]["responses"]["200"]["content"]
        assert set(stream) == {"text/event-stream", "application/json"}
        assert set(paths["/api/v1/logs"]["get"]["responses"]["200"]["content"]) == {"application/x-ndjson"}
        assert set(paths["/api/v1/yara/{name}"]["put"]["requestBody"]["content"]) == {"text/plain"}
        archive = paths["/api/v1/carves/{carve}/archive"]["get"]["responses"]["200"]["content"]
        assert set(archive) == {"application/octet-stream"}

    rig(test)
