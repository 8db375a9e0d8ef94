"""osqueryd's calls as Kolide Launcher makes them: JSON-RPC at the root path, its answers back in osquery's words. Pure.

As Launcher 0.9 to 2.x writes them (``pkg/service``, over go-kit's client): the version is an empty string, ids count
per method, the HTTP status is not looked at. An ``error`` member is a transport error, which never re-enrolls.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from osqbox.agent.client import Failure, Send
from osqbox.agent.messages import compact, encode, read_members

PATH = "/"
LAUNCHER_VERSION = "0.11.11"
LOG_TYPE_STRING, LOG_TYPE_STATUS = 0, 4
"""Launcher sends results, snapshots included, as 0 and status lines as 4."""

METHODS: Mapping[str, str] = {
    "enroll": "RequestEnrollment",
    "config": "RequestConfig",
    "read": "RequestQueries",
    "log": "PublishLogs",
    "write": "PublishResults",
}
"""Launcher's service has no carves: osquery sends those over TLS of its own."""

_DETAILS = {
    "os_version": ("os_version", "version"),
    "os_build_id": ("os_version", "build"),
    "os_platform": ("os_version", "platform"),
    "os_platform_like": ("os_version", "platform_like"),
    "os_name": ("os_version", "name"),
    "hostname": ("system_info", "hostname"),
    "hardware_vendor": ("system_info", "hardware_vendor"),
    "hardware_model": ("system_info", "hardware_model"),
    "hardware_serial": ("system_info", "hardware_serial"),
    "hardware_uuid": ("system_info", "uuid"),
    "osquery_version": ("osquery_info", "version"),
}


class Dialect:
    """One agent's side of the service; it counts the ids."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def call(self, command: Send) -> Send | Failure:
        """The call that stands for a command."""
        method = METHODS.get(command.call)
        if method is None:
            return Failure(f"Launcher's service has no {command.call}")
        number = self._counts.get(method, 0)
        self._counts[method] = number + 1
        params = _params(command.call, json.loads(command.body))
        body = encode({"jsonrpc": "", "method": method, "params": params, "id": number})
        return replace(command, path=PATH, body=body, node_key="", compress=False, method="POST")


def _params(call: str, body: dict[str, Any]) -> dict[str, Any]:
    if call == "enroll":
        return _enrollment(body)
    params: dict[str, Any] = {"node_key": body.get("node_key", "")}
    if call == "log":
        params["LogType"] = LOG_TYPE_STATUS if body["log_type"] == "status" else LOG_TYPE_STRING
        params["Logs"] = [compact(line) for line in body["data"]]
    elif call == "write":
        params["Results"] = list(_results(body))
    return params


def _enrollment(body: dict[str, Any]) -> dict[str, Any]:
    tables = body.get("host_details", {})
    details = {name: str(tables.get(table, {}).get(column, "")) for name, (table, column) in _DETAILS.items()}
    details |= {"launcher_version": LAUNCHER_VERSION, "goos": details["os_platform"], "goarch": "amd64"}
    named = ("host_identifier", "platform_type", "host_details")
    secret = next((value for name, value in body.items() if name not in named), "")
    return {
        "enroll_secret": secret,
        "host_identifier": body.get("host_identifier", ""),
        "EnrollmentDetails": {name: value for name, value in details.items() if value},
    }


def _results(body: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for name, rows in body.get("queries", {}).items():
        yield {
            "query_name": name,
            "status": body["statuses"].get(name, 0),
            "rows": rows,
            "stats": body["stats"].get(name),
            "message": body["messages"].get(name, ""),
        }


def reply(call: str, body: bytes) -> bytes:
    """The answer to a call as an osquery server would have given it."""
    answer = read_members(body)
    if answer is None:
        return _error("cannot parse the answer as a JSON-RPC object")
    error = answer.get("error")
    if error is not None:
        return _error(str(error.get("message", error)) if isinstance(error, dict) else str(error))
    result = answer.get("result")
    if not isinstance(result, dict):
        return _error("the answer has no result")
    if result.get("err") is not None:
        return _error("the result's err is not null")  # it decodes into a Go interface
    if result.get("node_invalid") is True:
        return encode({"node_invalid": True})
    return _taken(call, {name.lower(): value for name, value in result.items()})


def _taken(call: str, result: dict[str, Any]) -> bytes:
    if call == "config":
        config = result.get("config")
        return config.encode() if isinstance(config, str) else _error("config: expected a string of JSON")
    if call == "read":
        queries = result.get("queries")
        return encode(queries if isinstance(queries, dict) else {})
    return encode({"node_key": result.get("node_key", "")} if call == "enroll" else {})


def _error(message: str) -> bytes:
    return encode({"error": message})
