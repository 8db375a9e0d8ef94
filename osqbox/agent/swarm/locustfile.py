"""The locustfile for a swarm. Pure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from osqbox.agent.swarm.plan import SwarmPlan

_TEMPLATE = '''"""Agents of osqbox under Locust: pip install "osqbox[locust]" on every machine.

    locust -f THIS_FILE --headless --users {count} --spawn-rate {spawn_rate:g} --run-time {duration:.0f}s
    locust -f THIS_FILE --master --expect-workers 2          # the same over machines:
    locust -f THIS_FILE --worker --master-host HOST          # on each of them
"""

import os
from pathlib import Path

from osqbox.agent.messages import Endpoints
from osqbox.agent.swarm.locust import OsqueryAgent
from osqbox.agent.swarm.plan import Growth, Server, SwarmPlan, Trouble, read_mix


class Agent(OsqueryAgent):
    host = {url!r}
    ca = Path(os.environ.get("OSQBOX_CA_FILE", {ca!r})) if {has_ca} else None
    plan = SwarmPlan(
        server=Server({hostname!r}, {prefix!r}),
        growth=Growth({count}, {spawn_rate!r}, {duration!r}),
        mix=read_mix({mix!r}),
        enroll_secret=os.environ.get("OSQBOX_ENROLL_SECRET", {secret!r}),
        endpoints=Endpoints(
{endpoints}
        ),
        seed={seed!r},
        start_time={start_time!r},
        interval_s={interval_s!r},
        config_refresh_s={config_refresh_s!r},
        log_period_s={log_period_s!r},
        trouble=Trouble({trouble}),
        flags={flags!r},
    )
'''


def locustfile(plan: SwarmPlan, ca: Path | None, mix: str) -> str:
    """Ready to run. Holds the enroll secret; OSQBOX_ENROLL_SECRET and OSQBOX_CA_FILE win over what it says."""
    growth = plan.growth
    return _TEMPLATE.format(
        count=growth.count,
        spawn_rate=growth.spawn_rate,
        duration=growth.duration_s,
        url=f"https://{plan.server.hostname}",
        ca=str(ca or ""),
        has_ca=ca is not None,
        hostname=plan.server.hostname,
        prefix=plan.server.prefix,
        mix=mix,
        secret=plan.enroll_secret,
        endpoints="\n".join(f"            {name}={path!r}," for name, path in asdict(plan.endpoints).items()),
        seed=plan.seed,
        start_time=plan.start_time,
        interval_s=plan.interval_s,
        config_refresh_s=plan.config_refresh_s,
        log_period_s=plan.log_period_s,
        trouble=", ".join(f"{name}={value!r}" for name, value in asdict(plan.trouble).items()),
        flags=dict(plan.flags),
    )
