"""Interfaces, routes, neighbours and name resolution, all from the host's place in its network."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from osqbox.agent.profile.moment import Moment
from osqbox.agent.sql import Context, Row

_ARP_KEEPS_S = 300


def _link_local(mac: str) -> str:
    """RFC 4291, appendix A: the address an interface gives itself."""
    octets = bytes.fromhex(mac.replace(":", ""))
    middle = bytes((octets[0] ^ 2,)) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + middle))


def interface_addresses(m: Moment, _context: Context) -> Iterator[Row]:
    card, lo = m.description.network.interface, m.description.network.loopback
    mask6 = "ffff:ffff:ffff:ffff::"
    for name, address, mask, broadcast, kind in (
        (lo, "127.0.0.1", "255.0.0.0", "", "manual"),
        (lo, "::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "", "manual"),
        (card.name, m.address(), str(m.network.netmask), str(m.network.broadcast_address), "dhcp"),
        (card.name, _link_local(m.mac()), mask6, "", "auto"),
    ):
        point = {"point_to_point": "127.0.0.1" if address == "127.0.0.1" else "", "friendly_name": card.description}
        yield {"interface": name, "address": address, "mask": mask, "broadcast": broadcast, "type": kind, **point}


def interface_details(m: Moment, _context: Context) -> Iterator[Row]:
    network, age_s = m.description.network, m.at - m.boot
    card = network.interface
    mac_less = "00:00:00:00:00:00"
    for name, mac, kind, mtu, flags, speed, slot, rate in (
        (network.loopback, mac_less, 772, 65536, 73, 0, "", 20),
        (card.name, m.mac(), 1, card.mtu, 4163, card.speed_mbit, card.slot, 60),
    ):
        packets_in = int(age_s * rate * (0.5 + m.dice.share("packets in", name)))
        packets_out = packets_in if not speed else int(age_s * rate * (0.4 + m.dice.share("packets out", name)))
        yield {
            "interface": name,
            "mac": mac,
            "type": kind,
            "mtu": mtu,
            "metric": 0,
            "flags": flags,
            "ipackets": packets_in,
            "opackets": packets_out,
            "ibytes": packets_in * 612,
            "obytes": packets_out * (612 if not speed else 388),
            "ierrors": 0,
            "oerrors": 0,
            "idrops": packets_in // 90_000,
            "odrops": 0,
            "collisions": 0,
            "last_change": -1,
            "link_speed": speed or "",
            "pci_slot": slot,
            "friendly_name": card.description if speed else "",
            "dns_domain": network.domain if speed else "",
            "dns_host_name": m.hostname,
        }


def interface_ipv6(m: Moment, _context: Context) -> Iterator[Row]:
    network = m.description.network
    for name in (network.loopback, network.interface.name):
        yield {"interface": name, "hop_limit": 64, "forwarding_enabled": 0, "redirect_accept": 1, "rtadv_accept": 1}


def routes(m: Moment, _context: Context) -> Iterator[Row]:
    card, lo = m.description.network.interface, m.description.network.loopback
    net = m.network
    for destination, bits, gateway, flags, interface, kind in (
        ("0.0.0.0", 0, m.gateway, 3, card.name, "gateway"),  # noqa: S104 - the default route
        (str(net.network_address), net.prefixlen, "", 1, card.name, "gateway"),
        (m.address(), 32, "", 1, card.name, "local"),
        (str(net.broadcast_address), 32, "", 1, card.name, "broadcast"),
        ("127.0.0.0", 8, "", 1, lo, "local"),
        ("127.0.0.1", 32, "", 1, lo, "local"),
        ("fe80::", 64, "", 1, card.name, "gateway"),
        ("::1", 128, "", 1, lo, "local"),
    ):
        yield {
            "destination": destination,
            "netmask": bits,
            "gateway": gateway,
            "source": m.address() if interface == card.name and ":" not in destination else "",
            "flags": flags,
            "interface": interface,
            "mtu": card.mtu if interface == card.name else 65536,
            "metric": 100 if gateway else 0,
            "type": kind,
            "hopcount": 0,
        }


def arp_cache(m: Moment, _context: Context) -> Iterator[Row]:
    """The gateway, and those neighbours that were talked to in the last minutes."""
    card = m.description.network.interface
    yield {"address": m.gateway, "mac": f"{card.mac}:00:00:01", "interface": card.name, "permanent": "0"}
    seen = {m.gateway, m.address()}
    for offset in range(1, m.description.network.neighbours + 1):
        other = m.index + offset
        talked = m.dice.share("arp", other, (m.at + offset * 37) // _ARP_KEEPS_S) < 0.7
        address = m.address(other)
        if talked and address not in seen:
            seen.add(address)
            yield {"address": address, "mac": m.mac(other), "interface": card.name, "permanent": "0"}


def dns_resolvers(m: Moment, _context: Context) -> Iterator[Row]:
    network = m.description.network
    servers = network.resolvers or (m.gateway,)
    for at, address in enumerate(servers):
        yield {"id": at, "type": "nameserver", "address": address, "netmask": "32", "options": 705}
    yield {"id": 0, "type": "search", "address": network.domain, "netmask": "", "options": 705}


def etc_hosts(m: Moment, _context: Context) -> Iterator[Row]:
    domain = m.description.network.domain
    for address, names in (
        ("127.0.0.1", "localhost"),
        ("127.0.1.1", f"{m.hostname}.{domain} {m.hostname}"),
        ("::1", "localhost ip6-localhost ip6-loopback"),
    ):
        yield {"address": address, "hostnames": names, "pid_with_namespace": 0}


TABLES: Mapping[str, Any] = {
    "interface_addresses": (interface_addresses,),
    "interface_details": (interface_details,),
    "interface_ipv6": (interface_ipv6,),
    "routes": (routes,),
    "arp_cache": (arp_cache,),
    "dns_resolvers": (dns_resolvers,),
    "etc_hosts": (etc_hosts,),
}
