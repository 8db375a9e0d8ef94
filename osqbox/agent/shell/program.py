"""Which program a real shell is, as whom it runs, and with which environment."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from osqbox.agent.shell.terminal import ShellRefused

MARK = "OSQBOX_SHELL"
"""In the environment of everything a session starts: a word of its own."""
TERM = "xterm-256color"
_DEFAULT_SHELLS = ("/bin/bash", "/bin/sh")
_LOGIN_OPTION: Mapping[str, str] = {"bash": "--login", "fish": "--login"} | dict.fromkeys(
    ("sh", "dash", "ash", "ksh", "mksh", "zsh"), "-l"
)
_ROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_USER_PATH = "/usr/local/bin:/usr/bin:/bin"
_PASSED_ON = ("LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "TZ")


@dataclass(frozen=True, slots=True)
class User:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class Program:
    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    user: User
    changes_user: bool
    """Whether it runs as another user than the agent."""

    @property
    def shell(self) -> str:
        return self.argv[0]


def find_program(shell: str | None, user: str | None, *, login: bool = True) -> Program:
    """``shell`` is an absolute path, by default bash, else sh; ``user`` a name, by default the agent's own.

    Of the agent's environment only locale and time zone are passed on: it may hold secrets. Raises ShellRefused.
    """
    found = _find_user(user)
    path = shell or next((each for each in _DEFAULT_SHELLS if os.access(each, os.X_OK)), _DEFAULT_SHELLS[-1])
    if not os.path.isabs(path) or not os.path.isfile(path) or not os.access(path, os.X_OK):  # noqa: PTH113, PTH117
        raise ShellRefused(f"expected a shell that can be executed, by its whole path, got {path[:200]!r}")
    option = _LOGIN_OPTION.get(Path(path).name) if login else None
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {"TERM": TERM, "SHELL": path, "HOME": found.home, "USER": found.name, "LOGNAME": found.name}
    environment["PATH"] = _USER_PATH if found.uid else _ROOT_PATH
    directory = found.home if Path(found.home).is_dir() else "/"
    return Program((path, option) if option else (path,), environment, directory, found, found.uid != os.geteuid())


def _find_user(name: str | None) -> User:
    own = os.geteuid()
    try:
        entry = pwd.getpwuid(own) if name is None else pwd.getpwnam(name)
    except (KeyError, ValueError):
        if name is not None:
            raise ShellRefused(f"expected a user of this host, got {name[:100]!r}") from None
        return User(str(own), own, os.getegid(), "/")
    if own not in (0, entry.pw_uid):
        raise ShellRefused(
            f"cannot run a shell as {entry.pw_name}: the agent runs as user {own}, and only root may change users"
        )
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir or "/")
