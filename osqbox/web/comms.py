"""Pages of the comms API: agents, commands, events, states, groups and their configuration, upgrade files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlencode
from uuid import uuid4

import msgspec
from quart import request
from quart_trio.wrappers import TrioResponse

from osqbox.comms import registration
from osqbox.comms.errors import bad_request
from osqbox.comms.front import Comms
from osqbox.comms.messages import AgentStatus, CommandStatus, Group
from osqbox.comms.publication import parse_publication
from osqbox.operator.parts import OPERATOR
from osqbox.tenants import DEFAULT

from .site import Site, elsewhere, form

ROWS = 50


def add(site: Site) -> None:
    """The pages under ``/comms``; where the box has no comms API they say so."""
    _add_agents(site)
    _add_commands(site)
    _add_events(site)
    _add_groups(site)


def _add_agents(site: Site) -> None:
    @site.page("/comms/agents")
    async def agents_page() -> TrioResponse:
        comms, text = site.parts.served_comms(), request.args.get("q", "")
        agents = await comms.indexer.agents.page(
            tenant=DEFAULT, after=request.args.get("after", ""), limit=ROWS + 1, text=text
        )
        more = f"?{urlencode({'q': text, 'after': agents[ROWS - 1].uuid})}" if len(agents) > ROWS else ""
        return site.render("agents.html", agents=agents[:ROWS], groups=await _groups(comms), text=text, more=more)

    @site.page("/comms/agents", methods=("POST",))
    async def add_agent() -> TrioResponse:
        fields = await form()
        comms = site.parts.served_comms()
        agent = registration.new_agent(
            uuid=str(uuid4()),
            name=fields.get("name", "").strip(),
            groups=(fields.get("group", registration.DEFAULT_GROUP),),
            now=comms.clock.now(),
        )
        agent, key = await comms.add_agent(agent, None, actor=OPERATOR)
        return site.render("added.html", agent=agent, key=key)

    @site.page("/comms/agents/<uuid>")
    async def agent_page(uuid: str) -> TrioResponse:
        comms = site.parts.served_comms()
        agent = await comms.agent(DEFAULT, uuid)
        return site.render(
            "agent.html",
            agent=agent,
            names={agent.uuid: agent.name},
            known=await comms.indexer.commands.known(),
            rows=await comms.indexer.commands.page(agent=agent.uuid, limit=ROWS),
            events=await comms.events.search(tenant=DEFAULT, agent=agent.uuid, limit=20),
            shown=_shown,
        )

    @site.page("/comms/agents/<uuid>/status", methods=("POST",))
    async def change_agent(uuid: str) -> TrioResponse:
        comms = site.parts.served_comms()
        agent = await comms.agent(DEFAULT, uuid)
        wanted = (await form()).get("status", "")
        if wanted not in (AgentStatus.ACTIVE, AgentStatus.REVOKED):
            raise bad_request(f"status: expected active or revoked, got {wanted[:40]!r}")
        await comms.change_agent(agent.uuid, actor=OPERATOR, status=AgentStatus(wanted))
        return elsewhere(f"/comms/agents/{agent.uuid}")


def _add_commands(site: Site) -> None:
    @site.page("/comms/commands")
    async def commands_page() -> TrioResponse:
        comms, wanted = site.parts.served_comms(), request.args.get("status", "")
        rows = await comms.indexer.commands.page(
            tenant=DEFAULT,
            status=CommandStatus(wanted) if wanted in set(CommandStatus) else None,
            before=_number("before"),
            limit=ROWS + 1,
        )
        more = f"?{urlencode({'status': wanted, 'before': rows[ROWS - 1].seq})}" if len(rows) > ROWS else ""
        return site.render(
            "commands.html",
            rows=rows[:ROWS],
            names=await _names(comms, (command.agent for command in rows)),
            groups=await _groups(comms),
            known=await comms.indexer.commands.known(),
            statuses=[str(status) for status in CommandStatus],
            wanted=wanted,
            more=more,
        )

    @site.page("/comms/commands", methods=("POST",))
    async def send_command() -> TrioResponse:
        comms, fields = site.parts.served_comms(), await form()
        action = {"name": fields.get("name", ""), "args": _arguments(fields.get("args", ""))}
        agent = fields.get("agent", "")
        publication = parse_publication({"action": action, **_addressees(agent, fields.get("target", ""))})
        await comms.publisher.publish(publication, tenant=DEFAULT, actor=OPERATOR)
        return elsewhere(f"/comms/agents/{agent}" if agent else "/comms/commands")

    @site.page("/comms/commands/<id>/cancel", methods=("POST",))
    async def cancel_command(id: str) -> TrioResponse:
        comms = site.parts.served_comms()
        command = await comms.command(DEFAULT, id)
        await comms.indexer.commands.cancel([command.id], actor=OPERATOR)
        return elsewhere("/comms/commands")


def _add_events(site: Site) -> None:
    @site.page("/comms/events")
    async def events_page() -> TrioResponse:
        comms, text, agent = site.parts.served_comms(), request.args.get("q", ""), request.args.get("agent", "").strip()
        rows = await comms.events.search(
            tenant=DEFAULT, agent=agent or None, text=text, before=_number("before"), limit=ROWS + 1
        )
        more = f"?{urlencode({'q': text, 'agent': agent, 'before': rows[ROWS - 1][0]})}" if len(rows) > ROWS else ""
        return site.render(
            "events.html",
            events=rows[:ROWS],
            names=await _names(comms, (event.agent for _, event in rows)),
            text=text,
            agent_uuid=agent,
            shown=_shown,
            more=more,
        )

    @site.page("/comms/states")
    async def states_page() -> TrioResponse:
        comms, text, index = site.parts.served_comms(), request.args.get("q", ""), request.args.get("index", "")
        documents, after = await comms.indexer.states.search(
            tenant=DEFAULT, index=index or None, text=text, limit=ROWS, after=request.args.get("after", "")
        )
        return site.render(
            "states.html",
            documents=documents,
            names=await _names(comms, (document.agent for document in documents)),
            counts=await comms.indexer.states.count(),
            text=text,
            index=index,
            shown=_shown,
            more=f"?{urlencode({'q': text, 'index': index, 'after': after})}" if after else "",
        )


def _add_groups(site: Site) -> None:
    @site.page("/comms/groups")
    async def groups_page() -> TrioResponse:
        return site.render("groups.html", groups=await _groups(site.parts.served_comms()))

    @site.page("/comms/groups", methods=("POST",))
    async def make_group() -> TrioResponse:
        name = (await form()).get("name", "").strip()
        await site.parts.served_comms().configure(DEFAULT, name, "", actor=OPERATOR)
        return elsewhere(f"/comms/groups/{quote(name)}")

    @site.page("/comms/groups/<name>")
    async def group_page(name: str) -> TrioResponse:
        comms = site.parts.served_comms()
        group, versions = await comms.group(DEFAULT, name), await comms.indexer.groups.versions(DEFAULT, name)
        return site.render("group.html", group=group, versions=versions)

    @site.page("/comms/groups/<name>", methods=("POST",))
    async def change_group(name: str) -> TrioResponse:
        fields = await form()
        text = fields.get("configuration", "").replace("\r\n", "\n")
        version = fields.get("version", "")
        await site.parts.served_comms().configure(
            DEFAULT, name, text, actor=OPERATOR, expected_version=int(version) if version.isdecimal() else None
        )
        return elsewhere(f"/comms/groups/{quote(name)}")

    @site.page("/comms/upgrades")
    async def upgrades_page() -> TrioResponse:
        return site.render("upgrades.html", files=await site.parts.served_comms().upgrades.page(DEFAULT))


async def _groups(comms: Comms) -> list[Group]:
    return await comms.indexer.groups.page(DEFAULT)


async def _names(comms: Comms, uuids: Iterable[str]) -> dict[str, str]:
    found = {uuid: await comms.indexer.agents.find(uuid) for uuid in set(uuids)}
    return {uuid: agent.name for uuid, agent in found.items() if agent is not None}


def _shown(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def _number(name: str) -> int | None:
    given = request.args.get(name, "")
    return int(given) if given.isdecimal() and len(given) < 19 else None


def _addressees(agent: str, target: str) -> dict[str, Any]:
    if agent:
        return {"agents": [agent]}
    return {"all": True} if target == "all" else {"groups": [target.removeprefix("group:")]}


def _arguments(text: str) -> Any:
    try:
        return msgspec.json.decode(text or "{}")
    except msgspec.DecodeError as error:
        raise bad_request(f'arguments: expected JSON such as {{"file_name": "agent.wpk"}}, got: {error}') from None
