"""What the comms API refuses, with its number on the wire. Pure."""

from __future__ import annotations

from osqbox.errors import OsqboxError

RETRY_AFTER_S = 5
ATTEMPTS_AFTER_S = 60


class CommsError(OsqboxError):
    """An answer other than success: ``{"message": str, "code": int}``.

    ``code`` is the protocol's internal number (2706 an invalid token, 2707 an expired one, 2709 a malformed body ...),
    or the status where there is none. ``reason`` is one word, for counters and the audit.
    """

    def __init__(
        self, status: int, reason: str, message: str, *, code: int | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.code = status if code is None else code
        self.retry_after_s = retry_after_s


def bad_request(message: str, *, code: int | None = None, reason: str = "bad_request") -> CommsError:
    return CommsError(400, reason, message, code=code)


def not_found(what: str) -> CommsError:
    return CommsError(404, "not_found", f"{what} does not exist")


def conflict(message: str, *, code: int | None = None) -> CommsError:
    return CommsError(409, "conflict", message, code=code)


def busy(message: str, *, retry_after_s: int = RETRY_AFTER_S) -> CommsError:
    """503: everything is in order but for the moment; the same request may be sent again."""
    return CommsError(503, "busy", message, retry_after_s=retry_after_s)


def too_many_attempts() -> CommsError:
    return CommsError(
        429, "too_many_attempts", "too many failed logins; try again in a minute", retry_after_s=ATTEMPTS_AFTER_S
    )


class IndexerDown(CommsError):
    """The indexer did not confirm in time; nothing of the request may be taken as stored."""

    def __init__(self, message: str) -> None:
        super().__init__(503, "indexer_down", message, retry_after_s=RETRY_AFTER_S)
