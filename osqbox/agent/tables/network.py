"""Sockets, interfaces, routes and name resolution, from /proc/net, /sys/class/net and /etc."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from collections.abc import Iterator

from osqbox.agent.functions import SqlValue
from osqbox.agent.sql import Context, Row, TableSource, source
from osqbox.agent.tables.processes import all_pids, open_descriptors
from osqbox.agent.tables.reading import (
    list_directory,
    plain_lines,
    read_lines,
    read_link,
    read_word,
)

_TCP_STATES = (
    *("UNKNOWN", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSED"),
    *("CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING"),
)
_INET_FILES = (
    *(("tcp", socket.AF_INET, 6), ("tcp6", socket.AF_INET6, 6), ("udp", socket.AF_INET, 17)),
    *(("udp6", socket.AF_INET6, 17), ("udplite", socket.AF_INET, 136), ("udplite6", socket.AF_INET6, 136)),
    *(("raw", socket.AF_INET, 255), ("raw6", socket.AF_INET6, 255)),
)
_RTF_UP, _RTF_LOCAL = 0x0001, 0x80000000
_ARP_COMPLETE, _ARP_PERMANENT = 0x02, 0x04


def tables() -> dict[str, TableSource]:
    return {
        "process_open_sockets": source(process_open_sockets, "pid"),
        "listening_ports": source(listening_ports),
        "interface_addresses": source(interface_addresses),
        "interface_details": source(interface_details),
        "interface_ipv6": source(interface_ipv6),
        "routes": source(routes),
        "arp_cache": source(arp_cache),
        "dns_resolvers": source(dns_resolvers),
        "etc_hosts": source(etc_hosts),
        "etc_services": source(etc_services),
        "etc_protocols": source(etc_protocols),
    }


# -- sockets -----------------------------------------------------------------------------------------------------


def process_open_sockets(context: Context) -> Iterator[Row]:
    """Every socket of the agent's network namespace with its owner; pid and fd -1 when no process shows it."""
    wanted = context.integers("pid")
    owners: dict[int, list[tuple[int, int]]] = {}
    for pid in wanted if wanted is not None else all_pids():
        for number, target in open_descriptors(pid):
            if target.startswith("socket:["):
                owners.setdefault(int(target[8:-1]), []).append((pid, number))
    namespace = read_link("/proc/self/ns/net")[5:-1]
    for inode, row in _all_sockets():
        holders = owners.get(inode) or ([(-1, -1)] if wanted is None else [])
        for pid, number in holders:
            yield {**row, "pid": pid, "fd": number, "socket": inode, "net_namespace": namespace}


def listening_ports(_context: Context) -> Iterator[Row]:
    """Sockets waiting for peers: TCP that listens, other inet without a peer, unix with a name."""
    for row in process_open_sockets(Context()):
        protocol, family = row["protocol"], row["family"]
        if family == socket.AF_UNIX:
            waiting = bool(row["path"])
        elif protocol == 6:
            waiting = row["state"] == "LISTEN"
        else:
            waiting = row["remote_port"] == 0
        if waiting:
            kept = ("pid", "protocol", "family", "fd", "socket", "path", "net_namespace")
            yield {
                **{name: row[name] for name in kept},
                "address": row["local_address"],
                "port": row["local_port"],
            }


def _all_sockets() -> Iterator[tuple[int, Row]]:
    for name, family, protocol in _INET_FILES:
        for line in read_lines(f"/proc/net/{name}")[1:]:
            fields = line.split()
            if len(fields) < 10:
                continue
            local, local_port = _endpoint(fields[1])
            remote, remote_port = _endpoint(fields[2])
            state = int(fields[3], 16)
            yield (
                int(fields[9]),
                {
                    "family": int(family),
                    "protocol": protocol,
                    "local_address": local,
                    "local_port": local_port,
                    "remote_address": remote,
                    "remote_port": remote_port,
                    "path": "",
                    "state": _TCP_STATES[state] if protocol == 6 and state < len(_TCP_STATES) else "",
                },
            )
    for line in read_lines("/proc/net/unix")[1:]:
        fields = line.split(None, 7)
        if len(fields) >= 7:
            yield int(fields[6]), _unix_socket(fields[7] if len(fields) > 7 else "")


def _unix_socket(path: str) -> Row:
    blank: dict[str, SqlValue] = {"local_address": "", "remote_address": "", "local_port": 0, "remote_port": 0}
    return {**blank, "family": int(socket.AF_UNIX), "protocol": 0, "path": path, "state": ""}


def _endpoint(text: str) -> tuple[str, int]:
    """``0100007F:1F90`` as ``127.0.0.1, 8080``: the kernel prints addresses as words in host order."""
    address, _, port = text.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return str(ipaddress.ip_address(packed)), int(port, 16)


# -- interfaces --------------------------------------------------------------------------------------------------


def interface_addresses(_context: Context) -> Iterator[Row]:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        for found in addresses:
            if found.family in (socket.AF_INET, socket.AF_INET6):
                yield {
                    "interface": name,
                    "address": found.address.partition("%")[0],
                    "mask": found.netmask or "",
                    "broadcast": found.broadcast or "",
                    "point_to_point": found.ptp or "",
                    "type": "unknown",
                }


def interface_details(_context: Context) -> Iterator[Row]:
    counters = {
        "ipackets": "rx_packets",
        "opackets": "tx_packets",
        "ibytes": "rx_bytes",
        "obytes": "tx_bytes",
        "ierrors": "rx_errors",
        "oerrors": "tx_errors",
        "idrops": "rx_dropped",
        "odrops": "tx_dropped",
        "collisions": "collisions",
    }
    for name in list_directory("/sys/class/net"):
        base = f"/sys/class/net/{name}"
        row: dict[str, SqlValue] = {
            "interface": name,
            "mac": read_word(f"{base}/address"),
            "type": read_word(f"{base}/type"),
            "mtu": read_word(f"{base}/mtu"),
            "flags": int(read_word(f"{base}/flags") or "0", 16),
            "metric": 0,
            "last_change": -1,
            "link_speed": read_word(f"{base}/speed"),
            "pci_slot": _pci_slot(read_link(f"{base}/device")),
        }
        row.update({column: read_word(f"{base}/statistics/{file}") for column, file in counters.items()})
        if row["mac"] or row["mtu"]:
            yield row


def _pci_slot(device: str) -> str:
    slot = device.rpartition("/")[2]
    return slot if re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]", slot) else ""


def interface_ipv6(_context: Context) -> Iterator[Row]:
    files = {
        "hop_limit": "hop_limit",
        "forwarding_enabled": "forwarding",
        "redirect_accept": "accept_redirects",
        "rtadv_accept": "accept_ra",
    }
    for name in list_directory("/proc/sys/net/ipv6/conf"):
        if name not in ("all", "default"):
            base = f"/proc/sys/net/ipv6/conf/{name}"
            yield {"interface": name, **{column: read_word(f"{base}/{f}") for column, f in files.items()}}


# -- routes, neighbours, names -----------------------------------------------------------------------------------


def routes(_context: Context) -> Iterator[Row]:
    for line in read_lines("/proc/net/route")[1:]:
        fields = line.split()
        if len(fields) >= 11 and int(fields[3], 16) & _RTF_UP:
            mask = struct.pack("=I", int(fields[7], 16))
            yield {
                "destination": _word_address(fields[1]),
                "netmask": int.from_bytes(mask, "big").bit_count(),
                "gateway": "" if fields[2] == "00000000" else _word_address(fields[2]),
                "source": "",
                "flags": int(fields[3], 16),
                "interface": fields[0],
                "mtu": int(fields[8]),
                "metric": int(fields[6]),
                "type": "gateway",
                "hopcount": 0,
            }
    for line in read_lines("/proc/net/ipv6_route"):
        fields = line.split()
        if len(fields) >= 10 and int(fields[8], 16) & _RTF_UP:
            gateway = ipaddress.IPv6Address(int(fields[4], 16))
            yield {
                "destination": str(ipaddress.IPv6Address(int(fields[0], 16))),
                "netmask": int(fields[1], 16),
                "gateway": "" if int(gateway) == 0 else str(gateway),
                "source": "",
                "flags": int(fields[8], 16),
                "interface": fields[9],
                "mtu": "",
                "metric": int(fields[5], 16),
                "type": "local" if int(fields[8], 16) & _RTF_LOCAL else "gateway",
                "hopcount": 0,
            }


def _word_address(word: str) -> str:
    return str(ipaddress.IPv4Address(struct.pack("=I", int(word, 16))))


def arp_cache(_context: Context) -> Iterator[Row]:
    for line in read_lines("/proc/net/arp")[1:]:
        fields = line.split()
        if len(fields) >= 6 and int(fields[2], 16) & _ARP_COMPLETE:
            permanent = "1" if int(fields[2], 16) & _ARP_PERMANENT else "0"
            yield {"address": fields[0], "mac": fields[3], "interface": fields[5], "permanent": permanent}


def dns_resolvers(_context: Context) -> Iterator[Row]:
    numbers: dict[str, int] = {}
    for line in plain_lines("/etc/resolv.conf"):
        keyword, *values = line.split()
        kind = {"nameserver": "nameserver", "search": "search", "domain": "search", "sortlist": "sortlist"}
        if keyword in kind:
            for value in values:
                number = numbers.get(kind[keyword], 0)
                numbers[kind[keyword]] = number + 1
                yield {"id": number, "type": kind[keyword], "address": value, "netmask": "", "options": ""}


def etc_hosts(_context: Context) -> Iterator[Row]:
    for line in plain_lines("/etc/hosts"):
        address, *names = line.partition("#")[0].split()
        if names:
            yield {"address": address, "hostnames": " ".join(names), "pid_with_namespace": 0}


def etc_services(_context: Context) -> Iterator[Row]:
    for line in plain_lines("/etc/services"):
        text, _, comment = line.partition("#")
        fields = text.split()
        if len(fields) >= 2 and "/" in fields[1]:
            port, _, protocol = fields[1].partition("/")
            aliases = " ".join(fields[2:])
            yield {
                "name": fields[0],
                "port": port,
                "protocol": protocol,
                "aliases": aliases,
                "comment": comment.strip(),
            }


def etc_protocols(_context: Context) -> Iterator[Row]:
    for line in plain_lines("/etc/protocols"):
        text, _, comment = line.partition("#")
        fields = text.split()
        if len(fields) >= 2 and fields[1].isdigit():
            alias = fields[2] if len(fields) > 2 else ""
            yield {"name": fields[0], "number": fields[1], "alias": alias, "comment": comment.strip()}
