"""YARA rules read and matched in Python: what can be told without libyara, and a clear word about what cannot. Pure.

Text, hex and regular expression strings with their usual modifiers, and conditions of ``and or not``, ``N of``,
``any/all/none of``, counts, ``at``, ``in`` and ``filesize``. Modules, ``for`` loops, integer functions and XOR are not
supported: such a rule is refused by name, and never counts as not matching.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

MATCH_TIMEOUT_S = 5.0
MAX_RULES = 2000
MAX_DEPTH = 64
MAX_HITS = 10_000
_UNITS = {"KB": 1024, "MB": 1024 * 1024, "": 1}

_TOKEN = re.compile(
    r"""
    (?P<skip>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<text>"(?:[^"\\\n]|\\.)*")
    |(?P<number>0x[0-9a-fA-F]+|\d+(?:KB|MB)?)
    |(?P<name>[$\#@!]?[A-Za-z_]\w*\*?|[$\#@!]\*?)
    |(?P<mark>\.\.|==|!=|<=|>=|[-+*<>(){}\[\]=:,.|/])
    """,
    re.VERBOSE | re.DOTALL,
)
_HEX = re.compile(r"\s*(?:([0-9a-fA-F?]{2})|\[(\d*)(?:(-)(\d*))?\]|([(|)])|(~))")


class RulesRefused(ValueError):
    """The text is no set of rules, or needs what is not supported; says which and where."""


@dataclass(frozen=True, slots=True)
class Hit:
    identifier: str
    offset: int


@dataclass(frozen=True, slots=True)
class Match:
    rule: str
    tags: tuple[str, ...]
    hits: tuple[Hit, ...]


@dataclass(slots=True)
class _Seen:
    """One content under the strings of one rule."""

    size_bytes: int
    offsets: Mapping[str, Sequence[int]]
    matched: set[str]
    """Rules before this one that matched."""


_Condition = Callable[[_Seen], int]


@dataclass(slots=True)
class Rule:
    name: str
    tags: tuple[str, ...] = ()
    is_private: bool = False
    is_global: bool = False
    patterns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By string identifier: regular expressions of the `regex` package, for bytes."""
    condition: _Condition = lambda _seen: 0


def read_rules(text: str) -> list[Rule]:
    """Raises RulesRefused."""
    return _Parser(text).rules()


def match(rules: Sequence[Rule], content: bytes, timeout_s: float = MATCH_TIMEOUT_S) -> list[Match]:
    """The rules that match. Raises TimeoutError when a regular expression takes too long."""
    found, matched = list[Match](), set[str]()
    for rule in rules:
        offsets = {name: _offsets(patterns, content, timeout_s) for name, patterns in rule.patterns.items()}
        if not rule.condition(_Seen(len(content), offsets, matched)):
            if rule.is_global:
                return []
            continue
        matched.add(rule.name)
        if not rule.is_private:
            hits = tuple(Hit(name, at) for name, places in offsets.items() for at in places)
            found.append(Match(rule.name, rule.tags, hits))
    return found


def _offsets(patterns: Sequence[str], content: bytes, timeout_s: float) -> list[int]:
    import regex

    places: set[int] = set()
    for pattern in patterns:
        compiled = regex.compile(pattern.encode("latin-1"), regex.DOTALL)
        for number, found in enumerate(compiled.finditer(content, overlapped=True, timeout=timeout_s, concurrent=True)):
            places.add(found.start())
            if number >= MAX_HITS:
                break
    return sorted(places)


# -- reading -----------------------------------------------------------------------------------------------------


class _Parser:
    """Recursive descent over the text; strings are read by hand, because they are no tokens."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._rule = Rule("")
        self._names: list[str] = []

    def rules(self) -> list[Rule]:
        found: list[Rule] = []
        while self._peek():
            if self._peek() in ("import", "include"):
                raise self._refused(f"{self._peek()} is not supported")
            self._rule = Rule("")
            while self._peek() in ("private", "global"):
                word = self._next()
                self._rule.is_private |= word == "private"
                self._rule.is_global |= word == "global"
            self._expect("rule")
            found.append(self._body())
            self._names.append(found[-1].name)
            if len(found) > MAX_RULES:
                raise self._refused(f"more than {MAX_RULES} rules")
        if not found:
            raise RulesRefused("no rule in the text")
        return found

    def _body(self) -> Rule:
        rule = self._rule
        rule.name = self._next()
        if self._accept(":"):
            tags: list[str] = []
            while self._peek() not in ("{", ""):
                tags.append(self._next())
            rule.tags = tuple(tags)
        self._expect("{")
        if self._accept("meta"):
            self._expect(":")
            while self._peek() not in ("strings", "condition", ""):
                self._next()
        if self._accept("strings"):
            self._expect(":")
            while self._peek().startswith("$"):
                self._string()
        self._expect("condition")
        self._expect(":")
        rule.condition = self._any()
        self._expect("}")
        return rule

    def _string(self) -> None:
        name = self._next()
        if name == "$":
            name = f"$_{len(self._rule.patterns)}"
        self._expect("=")
        self._skip()
        start = self._text[self._at : self._at + 1]
        if start == '"':
            literal = _unescaped(self._next()[1:-1])
            self._rule.patterns[name] = _text_patterns(literal, self._modifiers())
        elif start == "{":
            end = self._text.find("}", self._at)
            self._rule.patterns[name] = (self._hex(self._text[self._at + 1 : end]),)
            self._at = end + 1
            self._modifiers()
        elif start == "/":
            self._rule.patterns[name] = self._regex()
        else:
            raise self._refused(f"expected a text, hex or regular expression for {name}")

    def _modifiers(self) -> set[str]:
        found: set[str] = set()
        while self._peek() in ("nocase", "wide", "ascii", "fullword", "private"):
            found.add(self._next())
        if self._peek() in ("xor", "base64", "base64wide"):
            raise self._refused(f"the modifier {self._peek()} is not supported")
        return found

    def _hex(self, body: str) -> str:
        pieces, at = list[str](), 0
        body = re.sub(r"//[^\n]*|/\*.*?\*/", " ", body, flags=re.DOTALL).strip()
        while at < len(body):
            found = _HEX.match(body, at)
            if found is None or found[6]:
                raise self._refused(f"cannot read the hex string at {body[at : at + 10]!r}")
            at = found.end()
            pair, low, dash, high, mark = found[1], found[2], found[3], found[4], found[5]
            if pair:
                pieces.append(_byte(pair))
            elif mark:
                pieces.append({"(": "(?:", ")": ")", "|": "|"}[mark])
            else:
                pieces.append(f".{{{low or 0},{high or ''}}}?" if dash else f".{{{low}}}")
        return "".join(pieces)

    def _regex(self) -> tuple[str, ...]:
        found = re.compile(r"/((?:[^/\\\n]|\\.)+)/([is]*)").match(self._text, self._at)
        if found is None:
            raise self._refused("cannot read the regular expression")
        self._at = found.end()
        flags = {flag for flag in found[2] if flag == "i"} | ({"i"} if "nocase" in self._modifiers() else set())
        source = found[1].replace("\\/", "/")
        _check_regex(source)
        return (f"(?i:{source})" if flags else source,)

    # -- conditions ----------------------------------------------------------------------------------------------

    def _any(self) -> _Condition:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refused("the condition is nested too deeply")
        parts = [self._all()]
        while self._accept("or"):
            parts.append(self._all())
        self._depth -= 1
        return parts[0] if len(parts) == 1 else lambda seen: any(part(seen) for part in parts)

    def _all(self) -> _Condition:
        parts = [self._not()]
        while self._accept("and"):
            parts.append(self._not())
        return parts[0] if len(parts) == 1 else lambda seen: all(part(seen) for part in parts)

    def _not(self) -> _Condition:
        if self._accept("not"):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise self._refused("the condition is nested too deeply")
            part = self._not()
            self._depth -= 1
            return lambda seen: not part(seen)
        return self._comparison()

    def _comparison(self) -> _Condition:
        left = self._value()
        compare = _COMPARISONS.get(self._peek())
        if compare is None:
            return left
        self._next()
        right = self._value()
        return lambda seen: compare(left(seen), right(seen))

    def _value(self) -> _Condition:
        word = self._peek()
        if word == "(":
            self._next()
            inner = self._any()
            self._expect(")")
            return inner
        if word in ("true", "false"):
            self._next()
            return lambda _seen: word == "true"
        if word == "filesize":
            self._next()
            return lambda seen: seen.size_bytes
        if word in ("any", "all", "none") or re.fullmatch(r"0x[0-9a-fA-F]+|\d+(KB|MB)?", word):
            return self._quantity(self._next())
        if word.startswith("#"):
            name = self._known("$" + self._next()[1:])
            return lambda seen: len(seen.offsets[name])
        if word.startswith("$"):
            return self._found(self._known(self._next()))
        if word in self._names:
            self._next()
            return lambda seen: word in seen.matched
        raise self._refused(f"cannot use {word or 'the end of the text'!r} in a condition")

    def _found(self, name: str) -> _Condition:
        if self._accept("at"):
            place = self._value()
            return lambda seen: place(seen) in seen.offsets[name]
        if self._accept("in"):
            self._expect("(")
            low = self._value()
            self._expect("..")
            high = self._value()
            self._expect(")")
            return lambda seen: any(low(seen) <= at <= high(seen) for at in seen.offsets[name])
        return lambda seen: bool(seen.offsets[name])

    def _quantity(self, word: str) -> _Condition:
        """A number, or how many of some strings."""
        if not self._accept("of"):
            if word in ("any", "all", "none"):
                raise self._refused(f"expected 'of' after {word}")
            number = _number(word)
            return lambda _seen: number
        names = self._set()
        if word == "none":
            return lambda seen: not any(seen.offsets[name] for name in names)
        wanted = 1 if word == "any" else len(names) if word == "all" else _number(word)
        return lambda seen: sum(1 for name in names if seen.offsets[name]) >= wanted

    def _set(self) -> list[str]:
        known = list(self._rule.patterns)
        if self._accept("them"):
            names = known
        else:
            self._expect("(")
            names = []
            while True:
                wanted = self._next()
                chosen = [name for name in known if fnmatchcase(name, wanted)]
                if not chosen:
                    raise self._refused(f"no string {wanted}")
                names += chosen
                if not self._accept(","):
                    break
            self._expect(")")
        if not names:
            raise self._refused("the rule has no strings")
        return names

    def _known(self, name: str) -> str:
        if name not in self._rule.patterns:
            raise self._refused(f"no string {name}")
        return name

    # -- words ---------------------------------------------------------------------------------------------------

    def _skip(self) -> None:
        while (found := _TOKEN.match(self._text, self._at)) and found.lastgroup == "skip":
            self._at = found.end()

    def _peek(self) -> str:
        self._skip()
        found = _TOKEN.match(self._text, self._at)
        if found is None and self._at < len(self._text):
            raise self._refused(f"cannot read {self._text[self._at : self._at + 20]!r}")
        return found[0] if found else ""

    def _next(self) -> str:
        word = self._peek()
        if not word:
            raise self._refused("the text ends too early")
        self._at += len(word)
        return word

    def _accept(self, word: str) -> bool:
        if self._peek() == word:
            self._next()
            return True
        return False

    def _expect(self, word: str) -> None:
        if not self._accept(word):
            raise self._refused(f"expected {word!r}, got {self._peek() or 'the end'!r}")

    def _refused(self, what: str) -> RulesRefused:
        line = self._text.count("\n", 0, self._at) + 1
        return RulesRefused(f"rule {self._rule.name or '?'}, line {line}: {what}")


_COMPARISONS: Mapping[str, Callable[[int, int], int]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _number(word: str) -> int:
    unit = word[-2:] if word[-2:] in _UNITS else ""
    return int(word.removesuffix(unit), 0 if word.startswith("0x") else 10) * _UNITS[unit]


def _unescaped(text: str) -> bytes:
    def one(found: re.Match[str]) -> str:
        return {"n": "\n", "t": "\t", "r": "\r"}.get(found[1]) or (chr(int(found[2], 16)) if found[2] else found[1])

    plain = text.encode("utf-8").decode("latin-1")
    return re.sub(r"\\(x([0-9a-fA-F]{2})|.)", one, plain).encode("latin-1")


def _text_patterns(literal: bytes, modifiers: set[str]) -> tuple[str, ...]:
    forms: list[bytes] = []
    if "wide" in modifiers:
        forms.append(b"".join(bytes((byte, 0)) for byte in literal))
    if "ascii" in modifiers or "wide" not in modifiers:
        forms.append(literal)
    return tuple(_pattern(form, modifiers) for form in forms)


def _pattern(literal: bytes, modifiers: set[str]) -> str:
    text = "".join(f"\\x{byte:02x}" for byte in literal)
    if "fullword" in modifiers:
        text = f"(?<![A-Za-z0-9]){text}(?![A-Za-z0-9])"
    return f"(?i:{text})" if "nocase" in modifiers else text


def _byte(pair: str) -> str:
    if pair == "??":
        return "."
    if "?" not in pair:
        return f"\\x{pair.lower()}"
    return "[" + "".join(f"\\x{byte:02x}" for byte in _nibbles(pair.lower())) + "]"


def _nibbles(pair: str) -> Iterator[int]:
    for other in "0123456789abcdef":
        yield int(pair.replace("?", other), 16)


def _check_regex(source: str) -> None:
    import regex

    try:
        regex.compile(source.encode("utf-8"))
    except regex.error as error:
        raise RulesRefused(f"cannot read the regular expression /{source[:100]}/: {error}") from error
