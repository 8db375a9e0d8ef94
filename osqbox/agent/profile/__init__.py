"""Pretended hosts: a profile in YAML describes a kind of machine; from it come as many hosts as one likes.

profile = load_profile("ubuntu")
host = profile.host(seed=7, index=3)
Engine(schema=profile.schema).query("select * from processes", tables=host.tables(clock.now))
"""

from osqbox.agent.profile.description import shipped_profiles
from osqbox.agent.profile.host import Host, HostIdentity, Profile, load_profile

__all__ = ["Host", "HostIdentity", "Profile", "load_profile", "shipped_profiles"]
