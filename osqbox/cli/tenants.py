"""``osqbox tenants``: who shares a box, and the secrets that let nodes in."""

from __future__ import annotations

from typing import Any

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import F, Listing, json_option, moment, print_facts, print_json, print_table, tell
from osqbox.client import at
from osqbox.errors import BadUsage

OPTIONS = ("open", "approve", "client_cert", "blank_keys")


@click.group("tenants", cls=Listing)
def command() -> None:
    """Tenants; a node's enroll secret chooses its tenant. Without a verb: list them."""


@command.command("list")
@json_option
@box_options
def list_tenants(box: Where, as_json: bool) -> None:
    """List tenants."""
    tenants = box.client.get("tenants")
    if as_json:
        print_json(tenants)
        return
    print_table(
        ("NAME", "STATE", "OPTIONS", "RE-ENROLLMENT"),
        [
            (
                tenant["name"],
                "closed" if tenant.get("closed_at") else "open to all" if tenant.get("open") else "active",
                [name for name in OPTIONS if tenant.get(name)],
                tenant.get("reenroll"),
            )
            for tenant in tenants
        ],
        empty="no tenants",
    )


def _tenant_options(function: F) -> F:
    for option in reversed(
        (
            click.option("--open/--no-open", default=None, help="Enroll without a secret."),
            click.option("--approve/--no-approve", default=None, help="New nodes wait for `osqbox nodes approve`."),
            click.option("--client-cert/--no-client-cert", default=None, help="Enroll by client certificate alone."),
            click.option("--blank-keys/--no-blank-keys", default=None, help="With --client-cert: empty node keys."),
            click.option(
                "--reenroll",
                type=click.Choice(["replace", "refuse"]),
                help="What a known host's second enrollment does.",
            ),
        )
    ):
        function = option(function)
    return function


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@command.command()
@click.argument("name")
@click.option("--enroll-secret", help="Its enroll secret. Default: the box makes one and prints it.")
@_tenant_options
@json_option
@box_options
def create(name: str, box: Where, as_json: bool, **options: Any) -> None:
    """Make a tenant; prints its enroll secret.

    The secret is shown only now: the box keeps its digest.
    """
    tenant = box.client.post("tenants", {"name": name, **_given(options)})
    _print_with_secret(tenant, as_json)


def _print_with_secret(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
    elif answer.get("enroll_secret"):
        click.echo(answer["enroll_secret"])


@command.command("set")
@click.argument("name")
@_tenant_options
@json_option
@box_options
def set_options(name: str, box: Where, as_json: bool, **options: Any) -> None:
    """Change how a tenant lets nodes in."""
    if not _given(options):
        raise BadUsage("expected an option to change, got none", hint="osqbox tenants set --help")
    tenant = box.client.patch(at("tenants", name), _given(options))
    if as_json:
        print_json(tenant)
    else:
        tell(f"{name}: changed")


@command.command()
@click.argument("name")
@json_option
@box_options
def show(name: str, box: Where, as_json: bool) -> None:
    """Everything known about one tenant."""
    tenant = box.client.get(at("tenants", name))
    if as_json:
        print_json(tenant)
    else:
        print_facts(tenant.items())


@command.command()
@click.argument("name")
@box_options
def close(name: str, box: Where) -> None:
    """Refuse a tenant's nodes and secrets from now on."""
    box.client.delete(at("tenants", name))
    tell(f"{name}: closed")


@command.command()
@click.argument("tenant")
@json_option
@box_options
def secrets(tenant: str, box: Where, as_json: bool) -> None:
    """List a tenant's enroll secrets.

    What they are is not kept, only how to recognise them.
    """
    found = box.client.get(at("tenants", tenant, "secrets"))
    if as_json:
        print_json(found)
        return
    print_table(
        ("ID", "LABEL", "TAGS", "EXPIRES", "USES LEFT", "USED"),
        [
            (
                secret["id"],
                secret["label"],
                secret["tags"],
                moment(secret["expires_at"], "never"),
                "any" if secret["uses_left"] is None else secret["uses_left"],
                secret["used"],
            )
            for secret in found
        ],
        empty="no secrets",
    )


@command.command("secret-add")
@click.argument("tenant")
@click.option("--secret", help="The secret. Default: the box makes one and prints it.")
@click.option("--label", help="What it is for.")
@click.option("--tag", "tags", multiple=True, help="Nodes that enroll with it get this tag; repeatable.")
@click.option("--expires-in", "expires_in_s", type=click.FloatRange(0, min_open=True), metavar="SECONDS")
@click.option("--uses", type=click.IntRange(1), help="How often it may be used.")
@json_option
@box_options
def secret_add(tenant: str, tags: tuple[str, ...], box: Where, as_json: bool, **options: Any) -> None:
    """Add an enroll secret; prints it, only now."""
    body = {**_given(options), **({"tags": list(tags)} if tags else {})}
    _print_with_secret(box.client.post(at("tenants", tenant, "secrets"), body), as_json)


@command.command("secret-remove")
@click.argument("tenant")
@click.argument("id", type=int)
@box_options
def secret_remove(tenant: str, id: int, box: Where) -> None:
    """Remove an enroll secret; nodes that used it stay."""
    box.client.delete(at("tenants", tenant, "secrets", id))
    tell(f"{tenant}: secret {id} removed")
