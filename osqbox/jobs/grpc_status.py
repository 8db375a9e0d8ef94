"""A gRPC status with its details as a `JobError`. Pure.

The details are google.rpc.Status (googleapis, google/rpc/status.proto and error_details.proto). Four small messages
do not pay for generated code and its import, so their fields are read from the wire format as they stand.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

from osqbox.jobs.errors import Code, JobError

_STATUS_DETAILS, _ANY_TYPE, _ANY_VALUE = 3, 1, 2
_DETAILS_BYTES = 64 * 1024


def status_error(status: int, message: str, details_base64: str = "") -> JobError:
    """The error that a server sent; a number that gRPC or we do not know is INTERNAL and is named."""
    try:
        code = Code(status)
    except ValueError:
        code, message = Code.INTERNAL, f"{message} (gRPC status {status})".strip()
    error = JobError(code, message or code.name.lower().replace("_", " "))
    try:
        for type_name, detail in _details(details_base64):
            _add(error, type_name, detail)
    except (ValueError, IndexError, binascii.Error):
        pass  # the status stands without its details
    return error


def _details(details_base64: str) -> Iterator[tuple[str, bytes]]:
    if len(details_base64) > _DETAILS_BYTES:
        return
    raw = base64.b64decode(details_base64 + "=" * (-len(details_base64) % 4))
    for number, packed in _fields(raw):
        if number == _STATUS_DETAILS and isinstance(packed, bytes):
            any_ = dict(_fields(packed))
            type_url, value = any_.get(_ANY_TYPE, b""), any_.get(_ANY_VALUE, b"")
            if isinstance(type_url, bytes) and isinstance(value, bytes):
                yield type_url.decode().rpartition("/")[2], value


def _add(error: JobError, type_name: str, detail: bytes) -> None:
    for number, value in _fields(detail):
        match type_name, number, value:
            case "google.rpc.ErrorInfo", 1, bytes(reason):
                error.reason = reason.decode()
            case "google.rpc.ErrorInfo", 3, bytes(entry):
                pair = dict(_fields(entry))
                if pair.get(1) in (b"job_id", b"process_id") and isinstance(job := pair.get(2), bytes):
                    error.job_id = job.decode()
            case "google.rpc.BadRequest", 1, bytes(violation):
                if isinstance(name := dict(_fields(violation)).get(1), bytes):
                    error.field = name.decode()
            case "google.rpc.RetryInfo", 1, bytes(delay):
                parts = dict(_fields(delay))
                seconds, nanoseconds = parts.get(1, 0), parts.get(2, 0)
                if isinstance(seconds, int) and isinstance(nanoseconds, int):
                    error.retry_after_s = seconds + nanoseconds / 1e9


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a message: varints as numbers, everything with a length as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
        elif kind == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("cut short")
            yield number, data[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a varint of more than ten bytes")
