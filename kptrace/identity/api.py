# SPDX-License-Identifier: Apache-2.0
"""What a watch needs of the API server: one GET, and the ways in which it fails."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

#: HTTP statuses that mean something of their own; the others are `server_error` from 500 on, else `http_error`.
_STATUS_REASONS = {
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    410: "expired",
    429: "throttled",
}
_STATUS_REMEDIES = {
    401: "the API server does not accept the credentials",
    403: "the account may not list and watch this: see deploy/ for the ClusterRole it needs",
    404: "the API server does not know this resource",
}


class ApiError(Exception):
    """The API server could not be asked, or its answer not be used.

    Attributes:
        reason: one of `ApiError.reasons`.
        retry_after: seconds that the server asked to wait, 0 if it did not.
        status: HTTP status of the answer, 0 where there was none.
    """

    reasons: ClassVar[tuple[str, ...]] = (
        "no_configuration",
        "unreachable",
        "tls",
        "timeout",
        "disconnected",
        *_STATUS_REASONS.values(),
        "server_error",
        "http_error",
        "malformed_stream",
        "internal",
    )

    def __init__(self, reason: str, detail: str, *, retry_after: float = 0.0, status: int = 0) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


def error_for(status: int, path: str, message: str = "", retry_after: float = 0.0) -> ApiError:
    """The error that an HTTP status (or the code of a watch's ERROR event) other than 200 is."""
    reason = _STATUS_REASONS.get(status, "server_error" if status >= 500 else "http_error")
    said = _STATUS_REMEDIES.get(status) or message
    text = f"{status} for {path}" + (f": {said}" if said else "")
    return ApiError(reason, text, retry_after=retry_after, status=status)


class Response(Protocol):
    """The answer to one GET, its body unread."""

    @property
    def status(self) -> int:
        """HTTP status."""
        ...

    @property
    def retry_after(self) -> float:
        """Seconds of the header Retry-After, 0 without."""
        ...

    def body(self) -> bytes:
        """All of it."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """What arrives, as it arrives, until the server ends it."""
        ...

    def close(self) -> None:
        """Give the connection back. Idempotent."""
        ...


class Api(Protocol):
    """An API server. What the network does to it or to its responses is an `ApiError`, and nothing else."""

    def get(self, path: str, query: Mapping[str, str], *, read_timeout: float) -> Response:
        """Ask; `read_timeout` is the longest silence, in seconds."""
        ...
