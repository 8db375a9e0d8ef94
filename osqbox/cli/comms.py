"""``osqbox comms``: the publisher's side of the comms API."""

from __future__ import annotations

import click

from osqbox.cli import comms_agents, comms_commands, comms_config, comms_events, comms_upgrades


@click.group("comms")
def command() -> None:
    """Agents of the comms API: who they are, what they are told, what they have said.

    \b
    Examples:
      osqbox comms config set web web.yml
      osqbox comms agents add web-1 --group web
      osqbox comms send web-1 restart --wait
      osqbox comms upgrades add agent-2.wpk
      osqbox comms send --group web upgrade file_name=agent-2.wpk
      osqbox comms events -f
    """


for verb in (
    comms_agents.agents,
    comms_commands.send,
    comms_commands.commands,
    comms_events.events,
    comms_events.states,
    comms_config.config,
    comms_upgrades.upgrades,
    comms_agents.keys,
):
    command.add_command(verb)
