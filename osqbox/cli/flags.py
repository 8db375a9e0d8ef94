"""``osqbox flags``: the osqueryd flag file of the running box."""

from __future__ import annotations

from pathlib import Path

import click

from osqbox.cli.find import Where, box_options
from osqbox.cli.output import tell
from osqbox.errors import BadSetup
from osqbox.flagfile import flagfile


@click.command("flags")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead of stdout.")
@click.option("--client-cert", is_flag=True, help="Have the agent present the first client certificate.")
@box_options
def command(out: Path | None, client_cert: bool, box: Where) -> None:
    """Print the flags that make a real osqueryd a node of the box.

    \b
    Example:
      osqbox flags --out osquery.flags && sudo osqueryd --flagfile osquery.flags
    """
    text = flagfile(box.find().ready, client_cert=client_cert)
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise BadSetup(f"cannot write {out}: {error.strerror}") from None
    tell(f"{out}: start a node with: osqueryd --flagfile {out}")
