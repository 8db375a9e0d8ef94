"""``osqbox agent capture``: a host profile from this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from osqbox.cli.output import count, tell


@click.command()
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead of to stdout.")
@click.option("--name", default="captured", metavar="NAME", help="The profile's name. Default: captured.")
@click.option("--no-redact", is_flag=True, help="Keep host and user names, addresses, serials, arguments, environment.")
def command(out: Path | None, name: str, no_redact: bool) -> int:
    """Describe this machine as a host profile for pretended hosts.

    Names of the host and of people, addresses, hardware ids, command line arguments and the values of environments
    are replaced by stand-ins. Names of packages, programs and system accounts stay: read the file before you share it.
    """
    import yaml

    from osqbox.agent.host import host_tables
    from osqbox.agent.profile.capture import capture
    from osqbox.agent.sql import Engine
    from osqbox.errors import BadSetup

    tables, engine = host_tables(), Engine()
    document = capture(
        lambda table: engine.raw_rows(table, tables=tables),
        tables,
        name=name,
        redact=not no_redact,
        now=time.time(),
        own_pid=os.getpid(),
    )
    kind = "not redacted" if no_redact else "redacted"
    head = f"# A host profile captured from a machine, {kind}. See docs/hosts.md of osqbox.\n"
    text = head + yaml.dump(document, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, width=120)
    if out is None:
        click.echo(text, nl=False)
        return 0
    if out.suffix not in (".yaml", ".yml"):
        raise BadSetup(f"expected a name ending .yaml, got {out}", hint=f"osqbox agent capture --out {out}.yaml")
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BadSetup(f"cannot write {out}: {error.strerror}") from error
    base = document["base"]
    tell(f"{out}: {count(len(base['processes']), 'process tree')}, {count(len(base['users']), 'user')}")
    return 0
