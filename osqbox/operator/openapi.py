"""The OpenAPI 3.1 document, from the routes and their msgspec shapes.

quart-schema finds the routes and puts the document together; what its msgspec support lacks is added here: lists and
nested structs, media types other than JSON, and the failures every route shares.
"""

from __future__ import annotations

from typing import Any

import msgspec
from quart_schema import HttpSecurityScheme, Info, QuartSchema
from quart_schema.openapi import OpenAPIProvider
from quart_trio import QuartTrio

from osqbox import __version__

from .answers import EVENTS, JSON, Failure
from .operations import operation_of

_REF = "#/components/schemas/{name}"


def install(app: QuartTrio) -> None:
    """Without quart-schema's own pages, which load their scripts from elsewhere."""
    QuartSchema(
        app,
        openapi_path=None,
        redoc_ui_path=None,
        scalar_ui_path=None,
        swagger_ui_path=None,
        info=Info(title="osqbox operator API", version=__version__),
        security_schemes={"token": HttpSecurityScheme(scheme="bearer")},
        security=[{"token": []}],
        conversion_preference="msgspec",
        openapi_provider_class=_Provider,
    )


def document(app: QuartTrio) -> dict[str, Any]:
    found: dict[str, Any] = app.extensions["QUART_SCHEMA"].openapi_provider.schema()
    return found


def _schema(shape: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    (schema,), components = msgspec.json.schema_components([shape], ref_template=_REF)
    return schema, components


class _Provider(OpenAPIProvider):
    def build_paths(self, rule: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        paths, components = super().build_paths(rule)
        found = operation_of(self._app.view_functions[rule.endpoint])
        failure, more = _schema(Failure)
        components.update(more)
        noun = rule.rule.removeprefix("/api/v1/").split("/")[0] if rule.rule.startswith("/api/v1/") else "box"
        for described in (each for path in paths.values() for each in path.values()):
            described["tags"] = [noun]
            if not described.get("description", "").strip():
                described.pop("description", None)
            if found is None:
                continue
            for status, media in found.media.items():
                content = described["responses"][status]["content"]
                content[media] = content.pop(JSON)
                for kind, shape in ((JSON, found.or_json), (EVENTS, found.or_events)):
                    if shape is not None:
                        schema, more = _schema(shape)
                        content[kind] = {"schema": schema}
                        components.update(more)
            described["responses"]["default"] = {
                "description": "Nothing was done",
                "content": {JSON: {"schema": failure}},
            }
            if found.takes_text or found.takes_octets:
                kind = "text/plain" if found.takes_text else "application/octet-stream"
                described["requestBody"] = {"required": True, "content": {kind: {"schema": {"type": "string"}}}}
            if found.is_open:
                described["security"] = []
        return paths, components

    def build_querystring_parameters(self, model: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        _, components = _schema(model)
        properties = components.pop(model.__name__)["properties"]
        return [_parameter(name, schema) for name, schema in properties.items()], components

    def build_request_body(self, model: Any, source: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG002
        schema, components = _schema(model)
        is_required = bool(components[model.__name__].get("required"))
        return {"required": is_required, "content": {JSON: {"schema": schema}}}, components

    def build_response_object(self, model: Any, headers_model: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG002
        schema, components = _schema(model)
        described = components.get(getattr(model, "__name__", ""), {}).get("description")
        return {"description": described or "Done", "content": {JSON: {"schema": schema}}}, components

    def operation_id(self, method: str, path: str, func: Any) -> str:  # noqa: ARG002
        name: str = func.__name__
        return name


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    parameter = {"name": name, "in": "query", "required": False, "schema": schema}
    if "description" in schema:
        parameter["description"] = schema.pop("description")
    return parameter
