"""Terminal output without what reaches beyond its screen: titles, clipboard, links, reports, mouse and paste. Pure.

What is left draws text, colours and cursor movements (ECMA-48, and DEC's private modes for cursor, wrap and the other
screen). Everything that makes a terminal answer, which a shell would read as typed, is dropped.
"""

from __future__ import annotations

import re

HELD_BYTES = 64 * 1024
"""A string sequence that is longer than this is dropped up to here, and its rest is text."""

_CONTROL = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]|\xc2[\x80-\x9f]")
"""Controls that do nothing good, ENQ among them, and the C1 controls as UTF-8."""
_SEQUENCE = re.compile(
    rb"\x1b(?:"
    rb"\[(?P<parameters>[0-?]*)(?P<between>[ -/]*)(?P<final>[@-~])"
    rb"|(?P<string>[\]PX^_])(?:[^\x07\x1b]|\x1b(?!\\))*(?:\x07|\x1b\\)"
    rb"|(?P<simple>[78=>DEMc]|[()*+][0-9A-Za-z])"
    rb")"
)
_BEGUN = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_](?:[^\x07\x1b]|\x1b(?!\\))*\x1b?|[()*+]?)?\Z|\xc2\Z")
_DRAWING = frozenset(b"ABCDEFGHIJKLMPSTXZ@`abdefmrsu")
_MODES = frozenset((b"1", b"7", b"12", b"25", b"47", b"1047", b"1048", b"1049"))


class Sanitizer:
    """Takes output in any pieces."""

    def __init__(self) -> None:
        self._held = b""

    def clean(self, data: bytes) -> bytes:
        data = self._held + data
        begun = _BEGUN.search(data)
        at = begun.start() if begun and len(data) - begun.start() <= HELD_BYTES else len(data)
        data, self._held = data[:at], data[at:]
        kept, position = [], 0
        for found in re.finditer(rb"\x1b", data):
            if found.start() < position:
                continue
            kept.append(_CONTROL.sub(b"", data[position : found.start()]))
            sequence = _SEQUENCE.match(data, found.start())
            position = sequence.end() if sequence else found.end()
            if sequence and _is_harmless(sequence):
                kept.append(sequence[0])
        kept.append(_CONTROL.sub(b"", data[position:]))
        return b"".join(kept)


def _is_harmless(sequence: re.Match[bytes]) -> bool:
    if sequence["simple"]:
        return True
    final = sequence["final"]
    if not final or sequence["between"]:
        return False
    parameters = sequence["parameters"]
    if final in b"hl":
        return parameters[:1] == b"?" and all(mode in _MODES for mode in parameters[1:].split(b";"))
    return final[0] in _DRAWING and parameters[:1] not in (b"<", b"=", b">", b"?")
