"""ASGI middleware: check key, size and time of a request, add headers, log and count."""

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_sentiment.serve.config import ServeConfig
from lora_sentiment.serve.messages import ErrorResponse, RefusalError
from lora_sentiment.serve.metrics import Metrics

log = logging.getLogger("lora_sentiment")

PREDICT = "/predict"
PREDICT_HF = "/"
PUBLIC_PATHS = (
    "/", "/page.css", "/page.js", "/openapi.json", "/health", "/healthz", "/readyz",
)  # fmt: skip
"""Paths that need no key, but for `POST /`: they tell nothing of adapters or texts."""
CLIENT_GONE = 499
"""Status of a request whose client disconnected, as in nginx. It only appears in the log and the
metrics."""
HEADERS = [
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]  # fmt: skip
"""Headers of every answer."""


def make_refusal(error: RefusalError) -> Response:
    """Return the answer to a refused request."""
    body = ErrorResponse(error=str(error), error_type=error.kind).model_dump_json()
    return Response(body, error.status, error.headers, "application/json")


def _is_prediction(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"] in (PREDICT, PREDICT_HF)


class Middleware:
    """Passes on the requests that are allowed. A prediction is passed on with its whole body."""

    def __init__(
        self, app: ASGIApp, *, config: ServeConfig, metrics: Metrics, paths: Collection[str]
    ) -> None:
        self._app = app
        self._limits = config.limits
        self._metrics = metrics
        self._paths = paths
        self._access_log = config.access_log
        self._key = None
        if config.api_key:
            self._key = config.api_key.get_secret_value().encode()
        self._num_in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, log it and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = CLIENT_GONE

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        # Never log an unknown path: people paste texts into addresses.
        route = scope["path"] if scope["path"] in self._paths else "other"
        # `gather` returns any exception, also a panic of the tokenizer, which is no `Exception`.
        (error,) = await asyncio.gather(
            self._handle(scope, receive, send_with_headers), return_exceptions=True
        )
        if error is not None and not isinstance(error, RefusalError):
            self._log_fault(error, route)
            error = RefusalError("Backend", "the server failed on this request; see its log")
        # There is no room for an error after the start of an answer.
        if error is not None and status == CLIENT_GONE:
            await make_refusal(error)(scope, receive, send_with_headers)
        self._count(scope, route, status, time.perf_counter() - started)

    def _log_fault(self, fault: BaseException, route: str) -> None:
        """Log the class and place of an exception, not its message, which may hold a text."""
        self._metrics.faults.inc()
        place = "".join(traceback.format_tb(fault.__traceback__))
        log.error("%s: %s was raised, at\n%s", route, type(fault).__name__, place)

    def _count(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        self._metrics.requests.labels(route, str(status)).inc()
        if _is_prediction(scope):
            self._metrics.seconds.observe(seconds)
        if self._access_log:
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            log.info("%s %s %d %.0f ms", method, route, status, 1000 * seconds)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on.

        Raises:
            RefusalError: If the request is not allowed, or the app refuses it.
        """
        # The router takes "/adapters\n" for "/adapters", so paths are compared here.
        if scope["path"] not in self._paths:
            raise RefusalError("NotFound", f"no such path; allowed: {', '.join(self._paths)}")
        headers = Headers(scope=scope)
        if scope["path"] not in PUBLIC_PATHS or _is_prediction(scope):
            self._check_key(headers.get("authorization", ""))
        if not _is_prediction(scope):
            await self._app(scope, receive, send)
            return
        self._check_predict_headers(headers)
        most = self._limits.max_requests
        if self._num_in_progress >= most:
            raise RefusalError(
                "Overloaded",
                f"{self._num_in_progress} predictions are in progress; allowed: {most}; try again "
                "later",
                headers={"Retry-After": "1"},
            )
        self._change_in_progress(1)
        try:
            body = await self._read_body(receive)
            if body is not None:
                await self._pass_on(body, scope, receive, send)
        finally:
            self._change_in_progress(-1)

    def _change_in_progress(self, by: int) -> None:
        self._num_in_progress += by
        self._metrics.in_progress.set(self._num_in_progress)

    def _check_key(self, authorization: str) -> None:
        if self._key is None:
            return
        scheme, _, key = authorization.partition(" ")
        # The time of this comparison does not depend on how much of a guess is right.
        is_right = hmac.compare_digest(key.strip().encode(), self._key)
        if not is_right or scheme.lower() != "bearer":
            raise RefusalError(
                "Unauthorized",
                "this server needs its key: send the header Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_predict_headers(self, headers: Headers) -> None:
        kind = headers.get("content-type", "").partition(";")[0]
        # A page of another site can send a form without asking first, but no JSON.
        if kind.strip().lower() != "application/json":
            raise RefusalError(
                "UnsupportedMediaType", "the body's Content-Type must be application/json"
            )
        # The HTTP parser allows only digits here.
        self._check_size(int(headers.get("content-length", "0")))

    def _check_size(self, size: int) -> None:
        most = self._limits.max_body_bytes
        if size > most:
            raise RefusalError(
                "TooLarge", f"the body is longer than allowed: {most:,} bytes; send it in parts"
            )

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Read a whole body. Return None if the client disconnects.

        Raises:
            RefusalError: If the body is too long or takes too much time.
        """
        body = bytearray()
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._check_size(len(body))
                    more = message.get("more_body", False)
        except TimeoutError:
            raise RefusalError(
                "Timeout", f"the body took longer to arrive than allowed: {seconds:g} seconds"
            ) from None
        return bytes(body)

    async def _pass_on(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body_first() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_body_first, send)
