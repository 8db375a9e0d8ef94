"""Files for agents to download: taken in as they come, kept by their SHA-256, sent whole or in part.

``<data>/upgrades/<tenant>/names/<name>`` says what a name stands for, ``.../blobs/<sha256>`` holds the bytes. A
download that has begun goes on with its bytes when the name gets others; an upload counts once it is whole and on disk.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import mkstemp
from typing import BinaryIO

import msgspec
import trio

from osqbox import audit
from osqbox.clock import Clock
from osqbox.exchange import Response, Write
from osqbox.store import Store, Tx

from . import protocol
from .errors import CommsError, bad_request, not_found
from .ranges import part_of

MIB = 1024 * 1024
FILE_MAX_BYTES = 4096 * MIB
FILES_MAX = 1000
"""Of one tenant."""
FREE_MIN_BYTES = 64 * MIB
"""What uploads leave free on the disk."""
WRITE_BYTES = 1 * MIB
READ_BYTES = 256 * 1024
NAME_TEXT = "1-128 of letters, digits, . _ + ~ -, not beginning with a dot"

_NAME = re.compile(r"[A-Za-z0-9_+~-][A-Za-z0-9._+~-]{0,127}", re.ASCII)


class UpgradeFile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    tenant: str
    size_bytes: int
    sha256: str
    """In hexadecimal."""
    added_at: float
    added_by: str

    @property
    def etag(self) -> str:
        return f'"{self.sha256}"'


class Spooled(msgspec.Struct, frozen=True, kw_only=True):
    """An upload that is whole, and has no name yet."""

    path: str
    size_bytes: int
    sha256: str


def check_name(name: str) -> None:
    """Raises CommsError 400, with upstream's numbers for path tricks."""
    if name.endswith("/"):
        raise bad_request(f"file name: expected {NAME_TEXT}, got one that ends in a slash", code=2704)
    if "/" in name:
        raise bad_request(f"file name: expected {NAME_TEXT}, got one with a slash", code=2705)
    if not _NAME.fullmatch(name):
        raise bad_request(f"file name: expected {NAME_TEXT}, got {name[:80]!r}")


class Upgrades:
    def __init__(self, directory: Path, store: Store, clock: Clock) -> None:
        self._directory = directory
        self._incoming = directory / ".incoming"
        self._store = store
        self._clock = clock
        self._changing = trio.Lock()
        self.sent_bytes = 0
        self.downloads = 0

    def sweep(self) -> None:
        """Remove what uploads left that a crash cut short."""
        shutil.rmtree(self._incoming, ignore_errors=True)

    # taking in

    def check_upload(self, name: str, size_bytes: int | None) -> None:
        """Before a byte of it is read. Raises CommsError 400, 413."""
        check_name(name)
        if size_bytes is not None and size_bytes > FILE_MAX_BYTES:
            raise _too_large()

    async def spool(self, pieces: AsyncIterator[bytes]) -> Spooled:
        """Write an upload to disk as it comes. Raises CommsError 413, 507; whatever is raised, nothing stays."""
        descriptor, path = await trio.to_thread.run_sync(self._begin)
        digest, size_bytes = hashlib.sha256(), 0
        pending = bytearray()
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                async for piece in pieces:
                    size_bytes += len(piece)
                    if size_bytes > FILE_MAX_BYTES:
                        raise _too_large()
                    pending += piece
                    if len(pending) >= WRITE_BYTES:
                        await trio.to_thread.run_sync(self._write, file, digest, bytes(pending))
                        pending.clear()
                await trio.to_thread.run_sync(self._write, file, digest, bytes(pending))
                await trio.to_thread.run_sync(os.fsync, file.fileno())
        except BaseException as error:
            os.unlink(path)  # noqa: PTH108 - at once, also when cancelled
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_space() from None
            raise
        return Spooled(path=path, size_bytes=size_bytes, sha256=digest.hexdigest())

    def discard(self, spooled: Spooled) -> None:
        """Of an upload that is not kept; nothing happens to one that is."""
        Path(spooled.path).unlink(missing_ok=True)

    async def keep(self, tenant: str, name: str, spooled: Spooled, *, actor: str) -> UpgradeFile:
        """From now on the name stands for these bytes. Raises CommsError 400, 409."""
        check_name(name)
        found = UpgradeFile(
            name=name,
            tenant=tenant,
            size_bytes=spooled.size_bytes,
            sha256=spooled.sha256,
            added_at=self._clock.now(),
            added_by=actor,
        )
        async with self._changing:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._keep, found, spooled)
                await self._store.write(partial(_note_added, found=found))
        return found

    async def remove(self, tenant: str, name: str, *, actor: str) -> None:
        """Raises CommsError 404."""
        check_name(name)
        async with self._changing:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._remove, tenant, name)
                await self._store.write(lambda tx: audit.record(tx, actor, "upgrade.remove", name, tenant=tenant))

    def _begin(self) -> tuple[int, str]:
        self._incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
        return mkstemp(dir=self._incoming)

    def _write(self, file: BinaryIO, digest: hashlib._Hash, data: bytes) -> None:
        if shutil.disk_usage(self._incoming).free < FREE_MIN_BYTES + len(data):
            raise _no_space()
        digest.update(data)
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]

    def _keep(self, found: UpgradeFile, spooled: Spooled) -> None:
        names, blobs = self._names(found.tenant), self._blobs(found.tenant)
        for folder in (names, blobs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = self._known(found.tenant)
        if found.name not in known and len(known) >= FILES_MAX:
            raise CommsError(409, "conflict", f"expected at most {FILES_MAX} upgrade files, got one more")
        Path(spooled.path).replace(blobs / found.sha256)
        _sync(blobs)
        draft = self._incoming / f"{found.sha256}.name"
        draft.write_bytes(msgspec.json.encode(found))
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(names / found.name)
        _sync(names)
        self._drop_unused(found.tenant)

    def _remove(self, tenant: str, name: str) -> None:
        try:
            (self._names(tenant) / name).unlink()
        except FileNotFoundError:
            raise not_found(f"upgrade file {name!r}") from None
        _sync(self._names(tenant))
        self._drop_unused(tenant)

    def _drop_unused(self, tenant: str) -> None:
        used = {found.sha256 for found in self._known(tenant).values()}
        for blob in self._blobs(tenant).iterdir():
            if blob.name not in used:
                blob.unlink()

    # looking up

    async def find(self, tenant: str, name: str) -> UpgradeFile:
        """Raises CommsError 400, 404."""
        check_name(name)
        found = await trio.to_thread.run_sync(_read, self._names(tenant) / name)
        if found is None:
            raise not_found(f"upgrade file {name!r}")
        return found

    async def page(self, tenant: str) -> list[UpgradeFile]:
        """All of them, by name."""
        known = await trio.to_thread.run_sync(self._known, tenant)
        return [known[name] for name in sorted(known)]

    def _known(self, tenant: str) -> dict[str, UpgradeFile]:
        if not self._names(tenant).is_dir():
            return {}
        found = (_read(path) for path in self._names(tenant).iterdir())
        return {each.name: each for each in found if each is not None}

    def _names(self, tenant: str) -> Path:
        return self._directory / tenant / "names"

    def _blobs(self, tenant: str) -> Path:
        return self._directory / tenant / "blobs"

    # sending

    async def answer(self, found: UpgradeFile, headers: Mapping[str, str]) -> Response:
        """The file, the part of it that is asked for, or 304. Raises CommsError 404, 416."""
        part = part_of(headers, found.size_bytes, found.etag)
        fields = [
            ("ETag", found.etag),
            ("Accept-Ranges", "bytes"),
            ("Repr-Digest", f"sha-256=:{base64.b64encode(bytes.fromhex(found.sha256)).decode()}:"),
            ("X-Checksum-SHA256", found.sha256),
            ("Content-Disposition", f'attachment; filename="{found.name}"'),
        ]
        if part.status == 304:
            return Response(b"", status=304, headers=tuple(fields))
        if part.status == 416:
            error = CommsError(416, "range", f"Range: expected one within {found.size_bytes} bytes")
            return protocol.failure(error, ("Content-Range", f"bytes */{found.size_bytes}"))
        if part.status == 206:
            last = part.start + part.size_bytes - 1
            fields.append(("Content-Range", f"bytes {part.start}-{last}/{found.size_bytes}"))
        return Response(
            b"",
            status=part.status,
            content_type=protocol.OCTETS,
            headers=tuple(fields),
            stream=partial(self._send, found, part.start, part.size_bytes),
            length_bytes=part.size_bytes,
        )

    async def _send(self, found: UpgradeFile, start: int, size_bytes: int, write: Write) -> None:
        self.downloads += 1
        path = self._blobs(found.tenant) / found.sha256
        with await trio.to_thread.run_sync(path.open, "rb") as file:
            await trio.to_thread.run_sync(file.seek, start)
            while size_bytes > 0:
                data = await trio.to_thread.run_sync(file.read, min(READ_BYTES, size_bytes))
                if not data:
                    raise OSError(errno.EIO, f"{path.name} is shorter than it was")
                await write(data)
                size_bytes -= len(data)
                self.sent_bytes += len(data)


def _note_added(tx: Tx, found: UpgradeFile) -> None:
    audit.record(
        tx, found.added_by, "upgrade.add", found.name,
        tenant=found.tenant, size_bytes=found.size_bytes, sha256=found.sha256,
    )  # fmt: skip


def _read(path: Path) -> UpgradeFile | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=UpgradeFile)
    except FileNotFoundError:
        return None


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _too_large() -> CommsError:
    return CommsError(413, "body_too_large", f"expected a file of at most {FILE_MAX_BYTES} bytes, got more")


def _no_space() -> CommsError:
    return CommsError(507, "no_space", f"the disk is full: expected {FREE_MIN_BYTES // MIB} MiB to stay free")
