"""``osqbox osqueryd``: a stand-in for the osqueryd program."""

from __future__ import annotations

import os

import click


@click.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    },
    add_help_option=False,
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> int:
    """Be osqueryd: WORDS are osqueryd's own flags, none of them ours.

    The daemon by default, ``-S`` for the shell; exit codes, files and messages are osqueryd's.
    """
    from osqbox.agent.osqueryd.program import main

    return main(words, os.environ)
