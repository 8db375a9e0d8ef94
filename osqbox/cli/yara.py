"""``osqbox yara``: rules that hosts fetch by ``sigurl``."""

from __future__ import annotations

from typing import BinaryIO

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import Listing, json_option, moment, print_json, print_table, tell
from osqbox.client import at
from osqbox.errors import BadSetup, BadUsage

RULE_BYTES = 4 * 1024 * 1024

_tenant_option = click.option("--tenant", default="default", show_default=True, help="The tenant it belongs to.")


@click.group("yara", cls=Listing)
def command() -> None:
    """YARA rules that hosts fetch. Without a verb: list them."""


@command.command("list")
@json_option
@box_options
def list_rules(box: Where, as_json: bool) -> None:
    """List the rules of all tenants."""
    rules = box.client.get("yara")
    if as_json:
        print_json(rules)
        return
    print_table(
        ("NAME", "TENANT", "PUBLIC", "BYTES", "CHANGED"),
        [
            (
                rule["name"],
                rule["tenant"],
                "yes" if rule["public"] else "no",
                rule["bytes"],
                moment(rule["updated_at"]),
            )
            for rule in rules
        ],
        empty="no rules; add one with: osqbox yara put NAME FILE",
    )


@command.command()
@click.argument("name")
@click.argument("file", type=click.File("rb"))
@_tenant_option
@click.option("--public", is_flag=True, help="Also for hosts without --yara_sigurl_authenticate, thus for anybody.")
@box_options
def put(name: str, file: BinaryIO, tenant: str, public: bool, box: Where) -> None:
    """Keep FILE (- for stdin) as a rule."""
    raw = file.read(RULE_BYTES + 1)
    if len(raw) > RULE_BYTES:
        raise BadUsage(f"{file.name}: expected at most {RULE_BYTES} bytes")
    try:
        rule = raw.decode()
    except UnicodeDecodeError as error:
        raise BadSetup(f"{file.name}: expected UTF-8, got the byte {raw[error.start]:#04x}") from None
    box.client.put(at("yara", name), rule, tenant=tenant, public=public)
    tell(f"{name}: kept for tenant {tenant}{' and the public' if public else ''}")


@command.command()
@click.argument("name")
@_tenant_option
@box_options
def delete(name: str, tenant: str, box: Where) -> None:
    """Remove a rule."""
    box.client.delete(at("yara", name), tenant=tenant)
    tell(f"{name}: deleted")
