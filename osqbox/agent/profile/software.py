"""Installed software of every kind, with the versions it has at the moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from osqbox.agent.profile.compiled import Software
from osqbox.agent.profile.moment import Moment
from osqbox.agent.sql import Context, Row


def _size(m: Moment, item: Software) -> int:
    return item.package.size or 40 + m.fleet.below(4000, "size", item.table, item.name)


def _deb(m: Moment, item: Software, version: str, _installed: int) -> Row:
    return {
        "name": item.name,
        "version": version,
        "source": item.package.source,
        "size": _size(m, item),
        "arch": item.package.arch or "amd64",
        "revision": version.rpartition("-")[2] if "-" in version else "",
        "status": "install ok installed",
        "maintainer": item.package.vendor,
        "section": item.package.section or "misc",
        "priority": "optional",
        "admindir": "/var/lib/dpkg",
        "pid_with_namespace": 0,
    }


def _rpm(m: Moment, item: Software, version: str, installed: int) -> Row:
    epoch, _, rest = version.rpartition(":")
    number, _, release = rest.partition("-")
    arch = item.package.arch or "x86_64"
    return {
        "name": item.name,
        "version": number,
        "release": release,
        "source": item.package.source or f"{item.name}-{number}-{release}.src.rpm",
        "size": _size(m, item) * 1024,
        "sha1": m.fleet.hexadecimal(40, "rpm", item.name, version),
        "arch": arch,
        "epoch": epoch or None,
        "install_time": installed,
        "vendor": item.package.vendor,
        "package_group": item.package.section or "Unspecified",
        "pid_with_namespace": 0,
    }


def _python(_m: Moment, item: Software, version: str, _installed: int) -> Row:
    directory = item.package.path or "/usr/lib/python3/dist-packages"
    return {
        "name": item.name,
        "uid": 0,
        "version": version,
        "summary": item.package.summary,
        "author": item.package.vendor,
        "license": "",
        "path": f"{directory}/{item.name.replace('-', '_')}-{version}.dist-info",
        "directory": directory,
        "pid_with_namespace": 0,
    }


def _app(m: Moment, item: Software, version: str, installed: int) -> Row:
    path = item.package.path or f"/Applications/{item.name}.app"
    opened = m.at - m.dice.below(7 * 86_400, "opened", item.name, m.at // 86_400)
    return {
        "name": f"{item.name}.app",
        "path": path,
        "bundle_executable": item.name,
        "bundle_identifier": item.package.identifier,
        "bundle_name": item.name,
        "bundle_short_version": version,
        "bundle_version": version,
        "bundle_package_type": "APPL",
        "element": "",
        "compiler": "",
        "development_region": "en",
        "display_name": item.name,
        "info_string": "",
        "minimum_system_version": "11.0",
        "category": item.package.section,
        "copyright": item.package.vendor,
        "last_opened_time": float(max(opened, installed)),
    }


def _homebrew(_m: Moment, item: Software, version: str, _installed: int) -> Row:
    prefix = "/opt/homebrew"
    kind = item.package.section or "formula"
    folder = "Caskroom" if kind == "cask" else "Cellar"
    return {
        "name": item.name,
        "path": f"{prefix}/{folder}/{item.name}",
        "version": version,
        "type": kind,
        "auto_updates": 0,
        "app_name": item.package.summary,
        "prefix": prefix,
    }


def _program(m: Moment, item: Software, version: str, installed: int) -> Row:
    guid = "{" + m.fleet.uuid("program", item.name, version) + "}"
    return {
        "name": item.name,
        "version": version,
        "install_location": item.package.path,
        "install_source": "",
        "language": "1033",
        "publisher": item.package.vendor,
        "uninstall_string": f"MsiExec.exe /X{guid}",
        "install_date": time.strftime("%Y%m%d", time.gmtime(installed)),
        "identifying_number": guid,
    }


_MAKERS: Mapping[str, Callable[[Moment, Software, str, int], Row]] = {
    "deb_packages": _deb,
    "rpm_packages": _rpm,
    "python_packages": _python,
    "apps": _app,
    "homebrew_packages": _homebrew,
    "programs": _program,
}
PACKAGE_TABLES = frozenset(_MAKERS)


def packages(m: Moment, context: Context, *, table: str) -> Iterator[Row]:
    make, wanted = _MAKERS[table], context.equal_to("name")
    for item, version, installed in m.software(table):
        if wanted is None or wanted.removesuffix(".app") == item.name:
            yield make(m, item, version, installed)


TABLES: Mapping[str, Any] = {table: (partial(packages, table=table), "name") for table in _MAKERS}
