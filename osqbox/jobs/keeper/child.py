"""The job itself, from fork to execve: what it inherits is decided here, and nothing else.

A session of its own, its cgroups, limits, user, directory and descriptors 0 to 2; default signals, nothing blocked,
umask 077, no new privileges, death with its keeper. What fails before the new program runs comes back as a StartError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import resource
import select
import signal
from collections.abc import Mapping

from .cgroups import Group
from .native import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl
from .spec import Spec, StartError

UMASK = 0o077
PIPE_BYTES = 256 * 1024
"""Asked of the kernel for each output pipe; it may give less."""
SOFT_OPEN_FILES = 1024
"""What programs that still use select() can bear; the hard limit is the box's."""
OOM_SCORE = b"500"
"""The job dies before the box and its keeper."""
START_LIMIT_MS = 30_000
"""For everything up to execve, which a dead network file system can hold up."""
MAX_FDS = 4096
"""Ours are few, and close-on-exec besides; kernels before 5.9 close these one by one."""
NOT_FOUND = (errno.ENOENT, errno.ENOTDIR)

Rlimit = tuple[int, int, int]


def environment(*, user: str, home: str, shell: str, job_id: str, extra: Mapping[str, str]) -> dict[str, str]:
    """All that a job sees: this base, and what its caller adds or overrides; JOB_ID stays."""
    base = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": home,
        "USER": user,
        "LOGNAME": user,
        "SHELL": shell,
        "LANG": "C.UTF-8",
    }
    return base | dict(extra) | {"JOB_ID": job_id}


class Job:
    """The running leader, and our ends of its pipes (non-blocking); ``stdin`` is None without one."""

    __slots__ = ("outputs", "pid", "stdin")

    def __init__(self, pid: int, outputs: dict[int, int], stdin: int | None) -> None:
        self.pid, self.stdin = pid, stdin
        self.outputs = outputs
        """Read end by stream number."""


def launch(spec: Spec, group: Group) -> Job:
    """Start the job. Raises StartError; no process, pipe or descriptor is left then."""
    limits = rlimits(spec, group)
    opened: list[int] = []
    try:
        stdio, ours, joins, status = _open_descriptors(spec, group, opened)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_job(parent, spec, limits, stdio, joins, status[1])
        for fd in {*stdio, *joins, status[1]}:
            os.close(fd)
            opened.remove(fd)
        _await_exec(pid, status[0])
        os.close(status[0])
        opened.remove(status[0])
    except StartError:
        _close(opened)
        raise
    except OSError as error:
        _close(opened)
        raise StartError("fork", error.errno or errno.EIO) from None
    stdin = ours.pop(-1, None)
    return Job(pid, ours, stdin)


def rlimits(spec: Spec, group: Group) -> list[Rlimit]:
    """Resource limits of the job; what no cgroup enforces is added to `group.enforced`. Raises StartError."""
    limits = spec.limits
    hard_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft_files = SOFT_OPEN_FILES if hard_files == resource.RLIM_INFINITY else min(SOFT_OPEN_FILES, hard_files)
    found = [(resource.RLIMIT_NOFILE, soft_files, hard_files)]
    found.append((resource.RLIMIT_CORE, 0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    def add(word: str, kind: int, value: int) -> None:
        if not group.enforces(word):
            found.append((kind, value, value))
            group.enforced.append(f"{word}:rlimit")

    if limits.memory_bytes is not None:
        add("memory", resource.RLIMIT_AS, limits.memory_bytes)
    if limits.cpu_cores is not None and not group.enforces("cpu"):
        raise StartError("limits", 0, "cpu_cores: expected a writable cpu cgroup, found none; leave the limit out")
    if limits.processes is not None:
        if not group.enforces("processes") and (spec.user.uid if spec.user else os.geteuid()) == 0:
            raise StartError("limits", 0, "processes: expected a writable pids cgroup or a user that is not root")
        add("processes", resource.RLIMIT_NPROC, limits.processes)
    if limits.cpu_time_s is not None:
        # SIGXCPU at the soft limit, SIGKILL a second later; the keeper watches the whole tree where a cgroup counts
        seconds = math.ceil(limits.cpu_time_s)
        found.append((resource.RLIMIT_CPU, seconds, seconds + 1))
        group.enforced.append("cpu_time:cgroup2" if group.is_v2 else "cpu_time:rlimit")
    if limits.open_files is not None:
        found[0] = (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files)
        group.enforced.append("open_files:rlimit")
    if limits.file_bytes is not None:
        add("file_bytes", resource.RLIMIT_FSIZE, limits.file_bytes)
    return found


def _open_descriptors(
    spec: Spec, group: Group, opened: list[int]
) -> tuple[tuple[int, int, int], dict[int, int], list[int], tuple[int, int]]:
    """The job's 0 to 2; our ends by stream (-1: its stdin); cgroups to join; the pipe that tells of execve."""
    try:
        ours: dict[int, int] = {}
        status = _pipe(opened)
        joins = group.join_fds()
        opened += joins
        if spec.stdin:
            stdin, ours[-1] = _pipe(opened)
        else:
            stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            opened.append(stdin)
        streams = (2,) if spec.merged else (0, 1)
        writers = []
        for stream in streams:
            ours[stream], writer = _pipe(opened)
            writers.append(writer)
            _widen(ours[stream])
        for fd in ours.values():
            os.set_blocking(fd, False)
        if spec.user is not None and os.geteuid() == 0:
            for fd in (stdin, *writers) if spec.stdin else writers:
                os.fchown(fd, spec.user.uid, spec.user.gid)  # else /dev/stdout could not be opened by another user
    except OSError as error:
        raise StartError("pipe", error.errno or errno.EIO) from None
    return (stdin, writers[0], writers[-1]), ours, joins, status


def _pipe(opened: list[int]) -> tuple[int, int]:
    ends = os.pipe()  # close-on-exec
    opened += ends
    return ends


def _widen(fd: int) -> None:
    with contextlib.suppress(OSError):  # the user's share of pipe pages is used up: a smaller pipe works as well
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _await_exec(pid: int, status: int) -> None:
    """End of file: the new program runs. Raises StartError with what the child reports; it is reaped then."""
    poll = select.poll()
    poll.register(status, select.POLLIN)
    if not poll.poll(START_LIMIT_MS):
        os.kill(pid, signal.SIGKILL)
        report = b"start %d " % errno.ETIMEDOUT
    else:
        report = os.read(status, 4096)
    if report:
        os.waitpid(pid, 0)
        step, number, message = report.decode("utf-8", "replace").split(" ", 2)
        raise StartError(step, int(number), message)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


# in the child, where nothing may be raised or returned


def _become_job(
    parent: int, spec: Spec, limits: list[Rlimit], stdio: tuple[int, int, int], joins: list[int], status: int
) -> None:
    step = "session"
    try:
        os.setsid()
        _reset_signals()
        step = "cgroup"
        for fd in joins:
            os.write(fd, b"0")
        step = "limits"
        _set_limits(limits)
        step = "user"
        _become_user(spec)
        os.umask(UMASK)
        step = "cwd"
        os.chdir(spec.cwd)
        step = "privileges"
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
        if os.getppid() != parent:
            os._exit(1)  # the keeper died before it could take us along
        step = "pipe"
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        os.closerange(3, status)
        os.closerange(status + 1, MAX_FDS)
        step = "exec"
        _exec(spec)
    except OSError as error:
        where = f"{spec.cwd[:256].decode('utf-8', 'backslashreplace')!r}: " if step == "cwd" else ""
        _report(status, step, error.errno or errno.EIO, f"{where}{error.strerror or ''}")
    except MemoryError:  # a limit too small even for this
        _report(status, step, errno.ENOMEM, os.strerror(errno.ENOMEM))
    except BaseException as error:  # noqa: BLE001 -- nothing may get past here: this is a copy of the keeper
        _report(status, step, errno.EINVAL, repr(error))
    finally:
        os._exit(1)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _set_limits(limits: list[Rlimit]) -> None:
    for kind, soft, hard in limits:
        try:
            resource.setrlimit(kind, (soft, hard))
        except ValueError:  # above our own hard limit, which only root may raise
            raise OSError(errno.EPERM, f"expected at most {resource.getrlimit(kind)[1]}, got {hard}") from None
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    except OSError:
        return  # a hardened /proc
    with contextlib.suppress(OSError):  # ours is higher already
        os.write(fd, OOM_SCORE)
    os.close(fd)


def _become_user(spec: Spec) -> None:
    user = spec.user
    if user is None or (os.geteuid() != 0 and (user.uid, user.gid) == (os.geteuid(), os.getegid())):
        return
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def _exec(spec: Spec) -> None:
    """Like execvp, but a file without an interpreter line is an error and never goes to a shell."""
    if b"/" in spec.command:
        os.execve(spec.command, spec.argv, spec.env)
    refusal = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in spec.env.get(b"PATH", b"").split(b":"):
        file = os.path.join(directory or b".", spec.command)
        try:
            os.execve(file, spec.argv, spec.env)
        except PermissionError as error:
            if os.path.exists(file):  # else it is the directory that may not be searched
                refusal = error
        except OSError as error:
            if error.errno not in NOT_FOUND:
                raise
    raise refusal


def _report(status: int, step: str, number: int, message: str) -> None:
    os.write(status, f"{step} {number} {message}".encode("utf-8", "replace")[:4096])
