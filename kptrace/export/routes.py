# SPDX-License-Identifier: Apache-2.0
"""What each path answers, and how many scrapes run at a time."""

from collections.abc import Callable
from http import HTTPStatus
from threading import BoundedSemaphore

import structlog

from kptrace.export import page
from kptrace.export.registry import Exporter
from kptrace.export.request import Request
from kptrace.export.response import HTML, JSON, Response
from kptrace.export.status import StatusPage, as_json

MAX_SCRAPES = 5
#: Whether all is attached, alone or with a line for people.
Readiness = bool | tuple[bool, str]
#: The JSON values at a path, or None.
Documents = Callable[[str], object | None]
_PATHS = {"metrics": "metrics", "status": "status", "liveness": "healthz", "readiness": "readyz"}


def no_documents(_path: str) -> object | None:
    """None at any path."""
    return None


class Routes:
    """Answers whole requests. Thread-safe; nothing here waits for a client."""

    def __init__(
        self,
        exporter: Exporter,
        status: StatusPage,
        ready: Callable[[], Readiness],
        max_scrapes: int = MAX_SCRAPES,
        documents: Documents = no_documents,
    ) -> None:
        """`max_scrapes` are rendered at a time, one more is sent away; `documents` are further ones by path."""
        self._exporter = exporter
        self._status = status
        self._ready = ready
        self._documents = documents
        self._scrapes = BoundedSemaphore(max_scrapes)

    def answer(self, request: Request) -> Response:
        """The answer; a failure is logged and is an answer too."""
        try:
            return self._answer(request)
        except Exception:  # noqa: BLE001  (logged: the server goes on after any failure of what it serves)
            structlog.get_logger().exception("request_failed", path=request.path)
            return Response.plain(HTTPStatus.INTERNAL_SERVER_ERROR, "failed; the log says why")

    def _answer(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            return Response.plain(HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")
        match request.path:
            case "/metrics":
                return self._metrics(request)
            case "/healthz":
                return Response.plain(HTTPStatus.OK, "ok")
            case "/readyz":
                return self._readiness()
            case "/status" if request.wants_html:
                return Response(HTTPStatus.OK, self._status.as_html(), HTML)
            case "/status":
                return Response(HTTPStatus.OK, self._status.as_json(), JSON)
            case "/":
                return Response(HTTPStatus.OK, page.document("kptrace", page.links(_PATHS)), HTML)
            case _:
                return self._document(request.path)

    def _document(self, path: str) -> Response:
        document = self._documents(path)
        if document is None:
            return Response.plain(HTTPStatus.NOT_FOUND)
        return Response(HTTPStatus.OK, as_json(document), JSON)

    def _metrics(self, request: Request) -> Response:
        if not self._scrapes.acquire(blocking=False):
            return Response.plain(HTTPStatus.SERVICE_UNAVAILABLE, "too many scrapes", Retry_After="1")
        try:
            body, headers = self._exporter.render(
                request.headers.get("accept", ""), request.headers.get("accept-encoding", "")
            )
        finally:
            self._scrapes.release()
        return Response(HTTPStatus.OK, body, headers.pop("Content-Type"), headers)

    def _readiness(self) -> Response:
        ready = self._ready()
        fine, detail = ready if isinstance(ready, tuple) else (ready, "")
        status = HTTPStatus.OK if fine else HTTPStatus.SERVICE_UNAVAILABLE
        return Response.plain(status, detail or ("ready" if fine else "starting"))
