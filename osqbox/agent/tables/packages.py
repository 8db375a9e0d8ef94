# ruff: noqa: PTH116, PTH122
# Thousands of paths per query: plain text and os.* cost a third of pathlib.
"""Installed software: Debian packages, their sources, and Python packages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from osqbox.agent.sql import Context, Row, TableSource, source
from osqbox.agent.tables.files import resolve
from osqbox.agent.tables.reading import list_directory, plain_lines, read_bytes, read_text

_DPKG = "/var/lib/dpkg"
_DPKG_LIMIT_BYTES = 64 * 1024 * 1024
_PYTHON_DIRECTORIES = (
    "/usr/local/lib/python%/dist-packages",
    "/usr/local/lib/python%/site-packages",
    "/usr/lib/python%/dist-packages",
    "/usr/lib/python%/site-packages",
    "/usr/lib64/python%/site-packages",
    "/opt/%/lib/python%/site-packages",
)


def tables() -> dict[str, TableSource]:
    return {
        "deb_packages": source(deb_packages, "admindir"),
        "apt_sources": source(apt_sources),
        "python_packages": source(python_packages, "directory"),
    }


def deb_packages(context: Context) -> Iterator[Row]:
    """Packages dpkg holds as installed (tables/system/linux/deb_packages.cpp); size in KiB, as dpkg has it."""
    admindir = context.equal_to("admindir") or _DPKG
    for paragraph in _status(admindir).split("\n\n"):
        fields = _paragraph(paragraph)
        version = fields.get("Version", "")
        if fields.get("Status", "").endswith(" installed"):
            yield {
                "name": fields.get("Package", ""),
                "version": version,
                "source": fields.get("Source", ""),
                "size": fields.get("Installed-Size", ""),
                "arch": fields.get("Architecture", ""),
                "revision": version.rpartition("-")[2] if "-" in version else "",
                "status": fields["Status"],
                "maintainer": fields.get("Maintainer", ""),
                "section": fields.get("Section", ""),
                "priority": fields.get("Priority", ""),
                "admindir": admindir,
                "pid_with_namespace": 0,
            }


def _status(admindir: str) -> str:
    """The status file, and the per-package files distroless images have instead."""
    texts = [read_bytes(f"{admindir}/status", _DPKG_LIMIT_BYTES).decode("utf-8", "replace")]
    single = [name for name in list_directory(f"{admindir}/status.d") if not name.endswith(".md5sums")]
    installed = "Status: install ok installed\n"
    texts.extend(installed + read_text(f"{admindir}/status.d/{name}") for name in single)
    return "\n\n".join(texts)


def _paragraph(text: str) -> dict[str, str]:
    """``Key: value`` lines; continuation lines are dropped."""
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        key, divider, value = line.partition(": ")
        if divider and not key.startswith((" ", "\t")):
            fields.setdefault(key, value.strip())
    return fields


def apt_sources(_context: Context) -> Iterator[Row]:
    """One row per ``deb`` line; what the fetched Release file says stays empty."""
    directory = "/etc/apt/sources.list.d"
    files = [f"{directory}/{name}" for name in list_directory(directory) if name.endswith(".list")]
    for path in ("/etc/apt/sources.list", *files):
        for line in plain_lines(path):
            found = re.match(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<rest>.*)", line)
            if found:
                arch = re.search(r"arch=(\S+)", found["options"] or "")
                yield {
                    "name": f"{found['uri']} {found['suite']}",
                    "source": path,
                    "base_uri": found["uri"],
                    "release": found["suite"],
                    "version": "",
                    "maintainer": "",
                    "components": found["rest"].strip(),
                    "architectures": arch[1].replace(",", " ") if arch else "",
                    "pid_with_namespace": 0,
                }


def python_packages(context: Context) -> Iterator[Row]:
    directory = context.equal_to("directory")
    found = (resolve(pattern, context) for pattern in _PYTHON_DIRECTORIES)
    places = [directory] if directory is not None else [path for paths in found for path in paths]
    for place in places:
        for name in list_directory(place):
            context.checkpoint()
            file = {".dist-info": "METADATA", ".egg-info": "PKG-INFO"}.get(os.path.splitext(name)[1])
            row = _python_package(f"{place}/{name}", file) if file else None
            if row is not None:
                yield {**row, "directory": place, "uid": _owner(place), "pid_with_namespace": 0}


def _python_package(path: str, file: str) -> Row | None:
    head = read_text(f"{path}/{file}", 256 * 1024) or read_text(path, 256 * 1024)
    fields = _paragraph(head.partition("\n\n")[0])
    if "Name" not in fields:
        return None
    return {
        "name": fields["Name"],
        "version": fields.get("Version", ""),
        "summary": fields.get("Summary", ""),
        "author": fields.get("Author", ""),
        "license": fields.get("License", ""),
        "path": path,
    }


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except OSError:
        return None
