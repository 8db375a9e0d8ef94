"""Stand-ins for what a captured machine must not give away: the same value always gets the same stand-in. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

_MAC = re.compile(r"(?<![0-9a-f:])(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}(?![0-9a-f:])", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}", re.IGNORECASE)
_LONG_HEX = re.compile(r"[0-9a-f]{24,}", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_IPV6 = re.compile(r"(?<![0-9a-f:])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![0-9a-f:])", re.IGNORECASE)
_MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")
_KEPT_NETWORKS = tuple(ipaddress.ip_network(text) for text in ("127.0.0.0/8", "0.0.0.0/32", "::/127"))
_SYSTEM_DIRECTORIES = re.compile(
    r"/(bin|sbin|lib\w*|usr/(bin|sbin|lib\w*|libexec|share)|dev|proc|sys|boot|etc|run|var)(/|$)"
)
_CASELESS = frozenset({"host", "domain", "user", "mac", "uuid"})
_NAME = "name"
"""The kind of a part of somebody's real name, which may be any word: it counts only as it is written."""
_MANY_NAMES = ("vm", "host", "server", "localhost")
"""Host names that are also everyday words would eat those words everywhere; they give nothing away."""


class Redactor:
    """Replaces what identifies a machine, its people and its secrets. Off, it returns everything as it is."""

    def __init__(self, secrets: Iterable[tuple[str, str]], *, enabled: bool) -> None:
        """``secrets`` are known values with the kind of stand-in each gets: ``host``, ``user``..."""
        self.enabled = enabled
        self._known: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}
        self._words = {
            form: self.stand_in(kind, word)
            for word, kind in secrets
            if len(word) > 1
            for form in ((word, word.lower(), word.upper(), word.capitalize()) if kind != _NAME else (word,))
        }
        longest_first = sorted((word for word in self._words if word.lower() not in _MANY_NAMES), key=len, reverse=True)
        choices = "|".join(re.escape(word) for word in longest_first)
        self._pattern = re.compile(rf"(?<![A-Za-z0-9])(?:{choices})(?![A-Za-z0-9])") if choices else None

    def stand_in(self, kind: str, value: str) -> str:
        """``user1``, ``user2``...; empty stays empty."""
        if not value or not self.enabled:
            return value
        value = value.lower() if kind in _CASELESS else value
        if (kind, value) not in self._known:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._known[kind, value] = f"{kind}{self._counts[kind]}"
        return self._known[kind, value]

    def text(self, value: str) -> str:
        """Free text, with what is known and what looks like an address or an id replaced."""
        if not self.enabled or not value:
            return value
        if self._pattern is not None:
            value = self._pattern.sub(lambda found: self._words[found[0]], value)
        value = _MAIL.sub(lambda found: self.stand_in("mail", found[0]), value)
        value = _UUID.sub(lambda found: self._uuid(found[0]), value)
        value = _LONG_HEX.sub(lambda found: self.stand_in("hex", found[0]), value)
        value = _MAC.sub(lambda found: self._mac(found[0]), value)
        value = _IPV4.sub(lambda found: self.address(found[0]), value)
        return _IPV6.sub(lambda found: self.address(found[0]), value)

    def path(self, value: str) -> str:
        """A path; of one outside the system's directories nothing but its depth and suffix is left."""
        if not self.enabled or not value:
            return value
        if _SYSTEM_DIRECTORIES.match(value) and "/home/" not in value:
            return self.text(value)
        return "/".join(self.stand_in("path", part) if part else "" for part in value.split("/"))

    def arguments(self, command: str) -> str:
        """A command line: its program stays, each argument gets a stand-in."""
        if not self.enabled:
            return command
        program, *arguments = command.split() or [""]
        known = program if re.fullmatch(r"[\w./-]{1,40}", program) else "program"
        return " ".join(
            [self.path(known) if "/" in known else self.text(known), *(self.stand_in("arg", a) for a in arguments)]
        )

    def address(self, value: str) -> str:
        """An IP address; loopback and the unspecified ones stay, and what is no address does too."""
        try:
            found = ipaddress.ip_address(value)
        except ValueError:
            return value
        if not self.enabled or any(found in network for network in _KEPT_NETWORKS if network.version == found.version):
            return value
        number = self._number("address", value)
        return f"198.18.{number // 250 % 250}.{number % 250 + 1}" if found.version == 4 else f"2001:db8::{number:x}"

    def _mac(self, value: str) -> str:
        number = self._number("mac", value)
        return value if value == "00:00:00:00:00:00" else f"02:00:00:00:{number // 256 % 256:02x}:{number % 256:02x}"

    def _uuid(self, value: str) -> str:
        return f"00000000-0000-4000-8000-{self._number('uuid', value.lower()):012d}"

    def _number(self, kind: str, value: str) -> int:
        return int(self.stand_in(kind, value).removeprefix(kind))
