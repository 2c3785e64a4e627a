"""What stands before the app: the key, the body's size and time, how many at once; headers and a line of log after."""

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Collection

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_sentiment.serve.config import ServeConfig
from lora_sentiment.serve.messages import ErrorResponse, RefusalError
from lora_sentiment.serve.metrics import Metrics

log = logging.getLogger("lora_sentiment")

PREDICT = "/predict"
OPEN = ("/", "/page.css", "/page.js", "/openapi.json", "/healthz", "/readyz")
"""What needs no key, because it tells nothing of adapters or texts."""
CLIENT_GONE = 499
"""Status of a request whose client went away: nginx's number, for the log and the counts; nobody receives it."""
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
    """Return the answer of an error."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.kind == "Unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    body = ErrorResponse(error=str(error), error_type=error.kind).model_dump_json()
    return Response(body, error.status, headers, "application/json")


class Guard:
    """ASGI middleware: lets through what is allowed, with its whole body read."""

    def __init__(
        self, app: ASGIApp, *, config: ServeConfig, metrics: Metrics, routes: Collection[str]
    ) -> None:
        self._app, self._limits, self._metrics = app, config.limits, metrics
        self._routes, self._logs = frozenset(routes), config.access_log
        self._key = config.api_key.get_secret_value().encode() if config.api_key else None
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever is raised meanwhile, and log and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_GONE

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        # The path of a route, never the one that was sent: people paste texts into addresses.
        route = scope["path"] if scope["path"] in self._routes else "other"
        try:
            work = self._let_through(scope, receive, send_with_headers)
            # Gathered, not caught: also a tokenizer's panic, which is no `Exception`, is an answer; a stop still stops.
            (fault,) = await asyncio.gather(work, return_exceptions=True)
            if fault is not None:
                self._tell(fault, route)
                # Once an answer has begun there is no room for another: the connection is closed.
                if status == CLIENT_GONE:
                    broken = RefusalError(
                        "Backend", "the request met a fault of the server; its log says where"
                    )
                    await make_refusal(broken)(scope, receive, send_with_headers)
        finally:
            self._count(scope, route, status, time.perf_counter() - started)

    def _tell(self, fault: BaseException, route: str) -> None:
        """Log what was raised and where; not its message, which may hold a text that was sent."""
        self._metrics.faults.inc()
        where = "".join(traceback.format_tb(fault.__traceback__))
        log.error("%s: %s was raised, at\n%s", route, type(fault).__name__, where)

    def _count(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        self._metrics.requests.labels(route, str(status)).inc()
        if route == PREDICT:
            self._metrics.seconds.observe(seconds)
        if self._logs:
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            log.info("%s %s %d %.0f ms", method, route, status, 1000 * seconds)

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # The router takes "/adapters\n" for "/adapters"; here a path is a known one or none.
            if scope["path"] not in self._routes:
                raise RefusalError(
                    "NotFound", f"no such path; there are {', '.join(sorted(self._routes))}"
                )
            self._check_key(scope)
            if scope["path"] != PREDICT or scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            self._check_predict(scope)
        except RefusalError as error:
            await make_refusal(error)(scope, receive, send)
            return
        self._under_way += 1
        self._metrics.under_way.set(self._under_way)
        try:
            await self._read_then_answer(scope, receive, send)
        finally:
            self._under_way -= 1
            self._metrics.under_way.set(self._under_way)

    async def _read_then_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._read(receive)
        except TimeoutError:
            seconds = self._limits.body_seconds
            late = RefusalError(
                "Timeout", f"the body took longer to arrive than allowed: {seconds:g} seconds"
            )
            await make_refusal(late)(scope, receive, send)
            return
        except RefusalError as error:
            await make_refusal(error)(scope, receive, send)
            return
        if body is None:
            return  # the client went away before it had said what it wanted
        given = False

        async def receive_again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_again, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Read a body whole, counting it as it comes; None where the client went away meanwhile.

        Raises:
            RefusalError: For more than is allowed.
        """
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            self._check_size(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN:
            return
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        # Compared in constant time: how long it takes must not say how much of a guess was right.
        if not hmac.compare_digest(key.strip(), self._key) or scheme.lower() != b"bearer":
            raise RefusalError(
                "Unauthorized",
                "this server needs its key: send the header Authorization: Bearer KEY",
            )

    def _check_predict(self, scope: Scope) -> None:
        """Refuse by the header alone what no body could make right."""
        kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise RefusalError(
                "UnsupportedMediaType", "the body's Content-Type must be application/json"
            )
        length = _header(scope, b"content-length")
        self._check_size(int(length[:20]) if length.isdigit() else 0)
        if self._under_way >= self._limits.max_requests:
            raise RefusalError(
                "Overloaded",
                f"{self._under_way} predictions are under way; allowed: {self._limits.max_requests}; try again later",
                retry_after=1,
            )

    def _check_size(self, size: int) -> None:
        most = self._limits.max_body_bytes
        if size > most:
            raise RefusalError(
                "TooLarge", f"the body is longer than allowed: {most:,} bytes; send it in parts"
            )


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
