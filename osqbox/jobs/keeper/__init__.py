"""The keeper: one small process per job that owns its pipes, its end and its log, and outlives the box.

The box starts one *zygote* (``wire.zygote_command``), which forks a keeper per job; the keeper forks the job. All of it
is standard library only and runs under ``python -I -S``. What follows is the contract with the box.

Starting a job
--------------
``wire.spawn(zygote, spec, job_dir_fd)`` sends one SOCK_SEQPACKET packet with three descriptors (a memfd holding the
spec as JSON, the job directory, one end of a stream socketpair) and returns the other end: the keeper's first client.
The first line on it is ``{"status": {... "state": "running"}}`` once ``execve`` succeeded, or
``{"ended": {... "state": "failed_to_start", "failure": {...}}}``. End of file before any line: the keeper could not be
made at all (no descriptors left in the zygote, or it was killed).

Spec, UTF-8 JSON; every string that Linux takes as bytes is decoded with ``surrogateescape``::

    {"id": "01J...",                    # JOB_ID: unguessable, [A-Za-z0-9_-]{8,64}
     "command": "/bin/ls",              # argv[0]; without a slash looked up in PATH of "env", never through a shell
     "args": ["-la"],                   # without argv[0]
     "env": {"PATH": "...", ...},       # the whole environment but JOB_ID, which the keeper adds (child.environment)
     "cwd": "/home/alice",
     "user": {"uid": 1000, "gid": 1000, "groups": [1000]},   # or null: stay the user of the box
     "stdin": false,                    # true: a pipe; else /dev/null
     "merged": false,                   # true: stdout and stderr share one pipe
     "timeout_s": null,
     "stop_grace_s": 10.0,
     "stop_signal": 15,
     "keep_leftovers": false,
     "max_output_bytes": 1073741824,    # or null
     "reserve_bytes": null,             # a disk with less left than this counts as full
     "overflow": "keep_head_and_tail",  # kill | discard_new | keep_head_and_tail
     "limits": {"memory_bytes": null, "cpu_cores": null, "cpu_time_s": null,
                "processes": null, "open_files": null, "file_bytes": null},   # absent keys are null
     "containment": null}               # "process_group": use no cgroup even where one is writable

The job directory (0700, made by the box, empty) then holds
-----------------------------------------------------------
``output``       the bytes; file offset = log offset, always
``index``        ``wire.HOLE`` (``<QQQQ``, 32 bytes, all 0 until something is dropped): the dropped range of the output
                 [start, end), then the punched range of the index [start, end), both in bytes of their file. After it
                 records ``wire.RECORD`` (``<QIB3xQ``, 24 bytes): offset, length, stream (0 stdout, 1 stderr, 2 mixed),
                 wall ns; each written after its bytes. The head is written *before* a range is punched, so: read
                 ``output``, then read the head; what lies outside the dropped range is good. With ``discard_new``,
                 ``kill`` and a full disk the dropped range begins at ``output_bytes``, beyond the file.
``status.json``  the status object below, replaced by rename at every change of state
``socket``       where the keeper listens; ``wire.connect(job_dir_fd)``; gone with the keeper

Protocol: one JSON object per line, both ways
---------------------------------------------
box -> keeper, ``call`` is any integer, answered once each, not always in order::

    {"call": 1, "do": "stop", "signal": 15, "grace_s": 10.0, "by": "alice", "reason": "stopped", "leader_only": false}
    {"call": 2, "do": "signal", "signal": 10}      # to the leader
    {"call": 3, "do": "suspend"}   {"call": 4, "do": "resume"}   {"call": 5, "do": "status"}
    {"call": 6, "do": "input", "data": "<base64, at most 48 KiB>", "eof": false}

Of ``stop`` everything but ``do`` may be absent (null: as in the spec). Stopping twice is fine: the earlier end holds.

keeper -> box::

    {"call": 1, "ok": true}                        # "status": {...} beside it for ``status``
    {"call": 6, "error": "STDIN_CLOSED", "message": "..."}
    {"status": {...}}                              # at connect and at every change of state
    {"grew": [output_bytes, index_bytes, stdout_bytes, stderr_bytes]}     # coalesced; a slow reader gets the latest
    {"ended": {...}}                               # last of all; status.json is on disk by then

An ``input`` is answered when the pipe took its bytes. After ``ended``, and at an end of file or ECONNRESET without one
(``status.json`` then says how it ended), calls without an answer were not carried out. Errors: ``NOT_RUNNING
STDIN_NOT_OPEN STDIN_CLOSED INPUT_QUEUE_FULL INVALID NOT_PERMITTED``. Lines are at most ``wire.MAX_LINE_BYTES``; a
client that sends longer ones is dropped.

Status object::

    {"id", "state": "pending|running|suspended|stopping|exited|signaled|failed_to_start|lost",
     "pid", "started_at", "ended_at",              # seconds since the epoch, or null
     "exit_code", "signal", "core_dumped", "errno",
     "failure": null | {"step": "spec|log|pipe|cgroup|limits|fork|user|cwd|exec|...", "errno", "message"},
     "reason": null | "exit|stopped|timeout|oom|output_limit|shutdown|lost", "stopped_by",
     "output_bytes", "index_bytes", "stdout_bytes", "stderr_bytes",
     "output_truncated", "dropped": null | [start, end], "output_drained",
     "usage": {"user_s", "system_s", "max_rss_bytes"},
     "containment": "cgroup|process_group", "enforced": ["memory:cgroup1", "open_files:rlimit"],
     "leftover_processes", "cgroups": ["/sys/fs/cgroup/..."]}

``stdout_bytes`` and ``stderr_bytes`` count what the job wrote, dropped bytes included (all mixed output is stdout);
``output_bytes`` is the length of the log; ``index_bytes`` counts the head.

Spared leftovers (``keep_leftovers``) stay in ``cgroups``, which ``cgroups.remove_empty`` removes once they have ended.
After the keeper's own death (``socket`` refuses and ``status.json`` has not ended) the leader is dead too;
``tree.end_orphans(job_id, cgroups)`` ends the rest. ``capabilities.capabilities()`` says what this machine can do.
"""
