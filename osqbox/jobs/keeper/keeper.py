"""The loop of one keeper: output, input, clients, signals and time of one job, from its start to its last status.

One thread, one epoll; nothing in it waits for a client or a disk longer than a write takes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from . import tree
from .cgroups import Group, Hierarchies, make_group
from .child import PIPE_BYTES, Job, launch
from .clients import Client, Clients
from .input import Input
from .log import Log
from .loop import Loop
from .native import PR_SET_CHILD_SUBREAPER, name_process, prctl
from .spec import Spec, StartError, read_spec
from .status import Status, StatusFile
from .wire import KIB, CallError

READ_BYTES = 64 * KIB
DRAIN_S = 2.0
"""How long the pipes may stay open behind the leader."""
GROWTH_S = 0.004
"""Least time between two messages about growth."""
SMALL_BYTES = 4 * KIB
SMALL_READS = 256
SMALL_READS_PER_S = 500
"""A job that writes single bytes gets them read in larger pieces beyond this, which bounds its index."""
PAUSE_S = 0.002
KILL_S = 30.0
"""After that, what is left is in uninterruptible sleep and reported as leftover."""
UNSAVED_S = 24 * 3600.0
"""How long an end that the disk does not take waits for a client."""
CPU_LOOK_S = 0.02

Reply = dict[str, object]


def keep(fds: list[int], hierarchies: Hierarchies) -> None:
    """The whole life of a keeper, in its own process; returns when its job has ended and everything is told.

    `fds`: spec, job directory, first client.
    """
    os.setsid()
    os.umask(0o077)
    name_process(b"osqbox-keeper")
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    spec_fd, directory, client_fd = fds
    client = Client(socket.socket(fileno=client_fd))
    status = Status("")
    try:
        try:
            spec = read_spec(spec_fd)
        finally:
            os.close(spec_fd)
        status = Status(spec.id)
        keeper = Keeper(spec, directory, hierarchies, status)
    except StartError as error:
        fail(status, error)
        client.answer({"ended": status.facts()})
        return
    keeper.clients.add(client)
    keeper.run()


def fail(status: Status, error: StartError) -> None:
    status.state, status.ended_at = "failed_to_start", time.time()
    status.errno, status.failure = error.errno or None, error.facts()


class Keeper:
    """Making one opens the log and the socket; raises StartError, and nothing is left in the directory then."""

    def __init__(self, spec: Spec, directory: int, hierarchies: Hierarchies, status: Status) -> None:
        self.spec, self.directory, self.hierarchies, self.status = spec, directory, hierarchies, status
        self.job: Job | None = None
        self.group = Group()
        self.leader_status: int | None = None
        self.is_childless = self.is_killing = self.is_sparing = self.has_given_up = False
        self.stops_leader_only = False
        self.kill_rounds, self.kill_deadline = 0, 0.0
        self.small_reads, self.small_reads_at = float(SMALL_READS), time.monotonic()
        self.told_bytes, self.told_at = 0, 0.0
        self.buffer = memoryview(bytearray(READ_BYTES))
        opened: list[Callable[[], object]] = []
        try:
            self.loop = Loop()
            opened.append(self.loop.close)
            self.status_file = StatusFile(directory)
            self.log = Log(directory, spec.max_output_bytes, str(spec.overflow), spec.reserve_bytes)
            opened.append(self.log.close)
            self.clients = Clients(self.loop, directory, self._status_message, self._call)
            self._watch_signals()
        except OSError as error:
            for close in opened:
                close()
            for name in ("output", "index", "socket", "status.reserve"):
                _unlink(name, directory)
            raise StartError("log", error.errno or errno.EIO) from None

    # the way of a job

    def run(self) -> None:
        try:
            self._start()
            while not self._is_finished():
                self._turn()
            self._conclude()
        except StartError as error:
            fail(self.status, error)
        except Exception as error:  # noqa: BLE001 -- a bug here must not leave a job running that nobody watches
            self._abandon(error)
        self._finish()

    def _start(self) -> None:
        spec, status = self.spec, self.status
        usable = Hierarchies([], {}) if spec.containment == "process_group" else self.hierarchies
        self.group = make_group(usable, spec.id, spec.limits)
        status.cgroups = self.group.directories
        status.containment = "cgroup" if self.group.directory else "process_group"
        try:
            self.status_file.write(status)  # so that a box can clean up behind a keeper killed from here on
        except OSError as error:
            raise StartError("log", error.errno or errno.EIO) from None
        self.job = job = launch(spec, self.group)
        self.input = Input(self.loop, job.stdin)
        status.enforced, status.pid, status.started_at = self.group.enforced, job.pid, time.time()
        spec.forget_command()
        for stream, fd in job.outputs.items():
            self.loop.watch(fd, select.EPOLLIN, self._output_handler(stream, fd))
        if spec.timeout_s is not None:
            self.loop.at("timeout", spec.timeout_s, self._time_out)
        if spec.limits.cpu_time_s is not None and self.group.is_v2:
            self.loop.at("cpu", CPU_LOOK_S, self._look_at_cpu)
        self._enter("running")

    def _is_finished(self) -> bool:
        if self.leader_status is None or self.job is None or self.job.outputs:
            return False
        return self.is_childless or self.is_sparing or self.has_given_up

    def _turn(self) -> None:
        self.loop.turn()
        self._tell_growth()

    def _conclude(self) -> None:
        """How it ended."""
        status, ended = self.status, self.leader_status
        assert ended is not None
        if os.WIFEXITED(ended):
            status.state, status.exit_code = "exited", os.WEXITSTATUS(ended)
        else:
            status.state, status.signal, status.core_dumped = "signaled", os.WTERMSIG(ended), os.WCOREDUMP(ended)
        if status.reason is None:
            status.reason = self._natural_reason()
        if not self.is_childless:
            status.leftover_processes = self._count_left()

    def _natural_reason(self) -> str:
        if self.group.oom_kills() and self.status.exit_code != 0:
            return "oom"
        if self.status.signal == signal.SIGXCPU and self.spec.limits.cpu_time_s is not None:
            return "timeout"
        return "exit"

    def _abandon(self, error: Exception) -> None:
        self.group.kill()
        tree.kill_all(os.getpid())
        self.status.state = self.status.reason = "lost"
        self.status.ended_at = time.time()
        for stream, fd in list(self.job.outputs.items()) if self.job else ():
            self._close_output(stream, fd)
        self.status.failure = {"step": "keeper", "errno": 0, "message": repr(error)}

    def _finish(self) -> None:
        """Everything on disk, then everybody told, then nothing left."""
        self.loop.cancel_all()
        self._refresh()
        with contextlib.suppress(OSError):
            self.log.close()
        self._remove_groups()
        deadline, has_told = time.monotonic() + UNSAVED_S, False
        while not (self._save() or has_told) and time.monotonic() < deadline:
            has_told = self.clients.tell_end({"ended": self._facts()})
            if not has_told:
                self.loop.at("unsaved", 1.0, lambda: None)
                self.loop.turn()
        self.clients.stop_listening()
        if not has_told:
            self.clients.tell_end({"ended": self._facts()})
        self.clients.close()

    def _save(self) -> bool:
        """True as well for a directory that was deleted: nobody asks for this job any more."""
        try:
            self.status_file.write_last(self.status)
        except OSError:
            return os.fstat(self.directory).st_nlink == 0
        return True

    def _remove_groups(self) -> None:
        """Empty groups may be busy for a moment behind their last member."""
        for _ in range(100):
            self.group.remove()
            if not self.group.directories or self.is_sparing:
                break
            select.select((), (), (), 0.005)
        self.status.cgroups = self.group.directories

    # the end of processes

    def _watch_signals(self) -> None:
        """SIGCHLD, and SIGTERM as an orderly end, wake the loop; a terminal or a vanished box do not matter."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        self.loop.watch(reader, select.EPOLLIN, lambda _: self._signalled(os.read(reader, 4096)))

    def _signalled(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers and self.leader_status is None and not self.status.has_ended:
            self._stop(self.spec.stop_signal, self.spec.stop_grace_s, by=None, reason="shutdown")
        self._reap()

    def _reap(self) -> None:
        """Everybody who has ended: the leader, and orphans of the job, whose subreaper we are."""
        had_leader = self.leader_status is None
        while True:
            try:
                pid, ended, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                self.is_childless = True
                break
            if pid == 0:
                break
            total = self.status.usage
            total["user_s"] += usage.ru_utime
            total["system_s"] += usage.ru_stime
            total["max_rss_bytes"] = max(total["max_rss_bytes"], usage.ru_maxrss * KIB)
            if self.job is not None and pid == self.job.pid:
                self.leader_status, self.status.ended_at = ended, time.time()
        if had_leader and self.leader_status is not None:
            self._leader_ended()

    def _leader_ended(self) -> None:
        self.loop.cancel("timeout", "grace", "cpu")
        self.input.end("NOT_RUNNING", "the job has ended")
        self.loop.at("drain", DRAIN_S, self._give_up_draining)
        if self.is_childless:
            return
        if self.status.reason is None:
            self.status.leftover_processes = self._count_left()
        self.is_sparing = self.spec.keep_leftovers and (self.status.reason is None or self.stops_leader_only)
        if not self.is_sparing:
            self._kill()

    def _count_left(self) -> int:
        return len(self.group.pids() if self.group.directory else tree.descendants(os.getpid()))

    def _kill(self) -> None:
        """The whole tree, until nobody is left to wait for."""
        self.is_sparing = False
        if not self.is_killing:
            self.is_killing, self.kill_deadline = True, time.monotonic() + KILL_S
        self.group.kill()
        if self.group.directory is None or self.kill_rounds:
            tree.kill_all(os.getpid())  # also who left the group, which takes root
        self.kill_rounds += 1
        self.loop.at("kill", min(0.2, 0.005 * 2**self.kill_rounds), self._look_after_kill)

    def _look_after_kill(self) -> None:
        self._reap()
        if time.monotonic() > self.kill_deadline:
            self.has_given_up = True
        elif not self.is_childless:
            self._kill()

    # stop, suspend, limits

    def _stop(self, number: int, grace_s: float, *, by: str | None, reason: str, leader_only: bool = False) -> None:
        """Ask, and kill after the grace. Again: the earlier end holds, another signal is passed on."""
        if self.status.has_ended:
            raise CallError("NOT_RUNNING", "the job has ended")
        if self.leader_status is not None:
            self._kill()  # what was spared
            return
        status, is_first = self.status, self.status.state != "stopping"
        if is_first:
            status.reason, status.stopped_by = status.reason or reason, by
            self.stops_leader_only = leader_only
        if number == signal.SIGKILL and not leader_only:
            self._kill()
        else:
            self._send(number, leader_only=leader_only)
            self.loop.at("grace", grace_s, self._kill, earlier_holds=True)
        if status.state == "suspended":
            self._freeze(frozen=False)  # behind the signal, so that it is the first thing they see
        if is_first:
            self._enter("stopping")

    def _send(self, number: int, *, leader_only: bool) -> None:
        """The leader is not reaped yet, so both numbers are still ours."""
        assert self.job is not None
        with contextlib.suppress(ProcessLookupError):
            (os.kill if leader_only else os.killpg)(self.job.pid, number)

    def _freeze(self, *, frozen: bool) -> None:
        if self.group.freeze(frozen):
            return
        if frozen:
            tree.stop_all(os.getpid())
        else:
            tree.continue_all(os.getpid())

    def _time_out(self) -> None:
        self._stop(self.spec.stop_signal, self.spec.stop_grace_s, by=None, reason="timeout")

    def _look_at_cpu(self) -> None:
        limit_s, used_s = self.spec.limits.cpu_time_s, self.group.cpu_s()
        if limit_s is None or used_s is None:
            return
        if used_s >= limit_s:
            self._stop(signal.SIGKILL, 0, by=None, reason="timeout")
        else:
            self.loop.at("cpu", max(CPU_LOOK_S, (limit_s - used_s) / (os.cpu_count() or 1)), self._look_at_cpu)

    # output

    def _output_handler(self, stream: int, fd: int) -> Callable[[int], None]:
        return lambda _: self._read(stream, fd)

    def _read(self, stream: int, fd: int) -> None:
        try:
            count = os.readv(fd, [self.buffer])
        except BlockingIOError:
            return
        if count == 0:
            self._close_output(stream, fd)
            return
        self.log.append(stream, self.buffer[:count], time.time_ns())
        if self.log.has_reached_its_bound and self.spec.overflow == "kill" and not self.is_killing:
            self._stop(signal.SIGKILL, 0, by=None, reason="output_limit")
        if count < SMALL_BYTES:
            self._pace(fd)

    def _pace(self, fd: int) -> None:
        now = time.monotonic()
        earned = (now - self.small_reads_at) * SMALL_READS_PER_S
        self.small_reads, self.small_reads_at = min(SMALL_READS, self.small_reads + earned) - 1, now
        if self.small_reads < 0:
            self.loop.rest(fd, PAUSE_S)

    def _close_output(self, stream: int, fd: int) -> None:
        assert self.job is not None
        self.loop.unwatch(fd)
        os.close(fd)
        del self.job.outputs[stream]

    def _give_up_draining(self) -> None:
        """Somebody still holds the pipes: what they hold now, and no more."""
        assert self.job is not None
        for stream, fd in list(self.job.outputs.items()):
            for _ in range(PIPE_BYTES // READ_BYTES):
                if stream in self.job.outputs:
                    self._read(stream, fd)
            if stream in self.job.outputs:
                self.status.output_drained = False
                self._close_output(stream, fd)

    # calls

    def _call(self, client: Client, message: Reply) -> None:
        call = message.get("call")
        try:
            answer = self._do(client, call, message)
        except CallError as error:
            answer = _refusal(error)
        except (ValueError, TypeError, OverflowError) as error:
            answer = {"error": "INVALID", "message": str(error)}
        except PermissionError as error:
            answer = {"error": "NOT_PERMITTED", "message": str(error)}
        if answer is not None:
            self.clients.answer(client, {"call": call} | answer)

    def _do(self, client: Client, call: object, message: Reply) -> Reply | None:
        """The answer; None when it comes later."""

        def answer_later(error: CallError | None) -> None:
            self.clients.answer(client, {"call": call} | (_refusal(error) if error else {"ok": True}))

        match message.get("do"):
            case "status":
                return {"ok": True, "status": self._facts()}
            case "stop":
                self._stop_call(message)
            case "signal":
                os.kill(self._running().pid, _signal_number(message.get("signal"), None))
            case "suspend":
                self._suspend(suspended=True)
            case "resume":
                self._suspend(suspended=False)
            case "input":
                self._running()
                self.input.add(message.get("data", ""), eof=bool(message.get("eof")), answer=answer_later)
                return None
            case other:
                raise CallError(
                    "INVALID", f"do: expected status, stop, signal, suspend, resume or input, got {other!r}"
                )
        return {"ok": True}

    def _stop_call(self, message: Reply) -> None:
        grace_s = message.get("grace_s")
        self._stop(
            _signal_number(message.get("signal"), self.spec.stop_signal),
            self.spec.stop_grace_s if grace_s is None else max(0.0, float(str(grace_s))),
            by=None if message.get("by") is None else str(message["by"]),
            reason=str(message.get("reason") or "stopped"),
            leader_only=bool(message.get("leader_only")),
        )

    def _suspend(self, *, suspended: bool) -> None:
        self._running()
        if self.status.state == "stopping":
            raise CallError("NOT_RUNNING", "the job is being stopped")
        if (self.status.state == "suspended") != suspended:
            self._freeze(frozen=suspended)
            self._enter("suspended" if suspended else "running")

    def _running(self) -> Job:
        if self.job is None or self.leader_status is not None or self.status.has_ended:
            raise CallError("NOT_RUNNING", "the job has ended")
        return self.job

    # what is told

    def _enter(self, state: str) -> None:
        self.status.state = state
        self._refresh()
        with contextlib.suppress(OSError):  # a full disk: clients know, and the last status has its room
            self.status_file.write(self.status)
        self.clients.tell_status()

    def _tell_growth(self) -> None:
        """Whoever follows is woken by the write, at most every few milliseconds."""
        total = sum(self.log.stream_bytes)
        if total == self.told_bytes:
            return
        now = time.monotonic()
        if now < self.told_at + GROWTH_S:
            self.loop.at("growth", self.told_at + GROWTH_S - now, lambda: None, earlier_holds=True)
            return
        self.told_bytes, self.told_at = total, now
        self.clients.tell_growth(self._growth_message)

    def _status_message(self) -> Reply:
        return {"status": self._facts()}

    def _growth_message(self) -> Reply:
        log = self.log
        stdout, stderr, mixed = log.stream_bytes
        return {"grew": [log.output_bytes, log.index_bytes, stdout + mixed, stderr]}

    def _facts(self) -> Reply:
        self._refresh()
        return self.status.facts()

    def _refresh(self) -> None:
        status, log = self.status, self.log
        stdout, stderr, mixed = log.stream_bytes
        status.output_bytes, status.index_bytes = log.output_bytes, log.index_bytes
        status.stdout_bytes, status.stderr_bytes = stdout + mixed, stderr
        status.dropped, status.output_truncated = log.dropped, log.dropped is not None


def _refusal(error: CallError) -> Reply:
    return {"error": error.word, "message": str(error)}


def _signal_number(value: object, default: int | None) -> int:
    number = default if value is None else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= signal.SIGRTMAX:
        raise CallError("INVALID", f"signal: expected 1 to {signal.SIGRTMAX:d}, got {value!r:.80}")
    return number


def _unlink(name: str, directory: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=directory)
