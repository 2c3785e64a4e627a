"""Listen, answer, and stop without losing what was asked: uvicorn, with an end for connections that say nothing."""

import asyncio
import ipaddress
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_sentiment.errors import RecipeError
from lora_sentiment.serve.app import make_app
from lora_sentiment.serve.config import ServeConfig
from lora_sentiment.serve.messages import STATUSES, ErrorResponse, ErrorType
from lora_sentiment.serve.middleware import HEADERS

if TYPE_CHECKING:
    from lora_sentiment.serve.pool import Pool

log = logging.getLogger("lora_sentiment")

SAME_SECONDS = 1.0
"""Signals this close are one: a terminal's Ctrl-C reaches every process, and a launcher passes it on once more."""


def serve(config: ServeConfig, *, announce: Callable[[str], None]) -> None:
    """Load adapters and answer until SIGTERM or SIGINT; then finish what is queued.

    Args:
        config: What to serve, where, and the limits.
        announce: Called with the address once requests are taken.

    Raises:
        RecipeError: If the address cannot be listened on, or is not loopback and there is no key.
        AdapterError: As `load_pool`.
        ModelError: As `load_pool`; if a batch does not fit into memory.
    """
    # Before anything is imported or loaded: an address that is taken, or must not be, is known at once.
    bound = bind(config)
    try:
        from lora_sentiment.serve.pool import load_pool

        pool = load_pool(config.adapters, watch=config.watch, base=config.base, dtype=config.dtype)
        Server(pool, config, bound, announce=announce).run()
    finally:
        bound.close()


def bind(config: ServeConfig) -> socket.socket:
    """Bind the address, before anything is loaded.

    Raises:
        RecipeError: If it cannot be bound, or is not loopback and there is neither a key nor `no_api_key`.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
        if not (
            ipaddress.ip_address(address[0]).is_loopback or config.api_key or config.no_api_key
        ):
            raise RecipeError(
                f"serve: --host {config.host} can be reached from other machines: give --api-key-file FILE, or say "
                "--no-api-key if something in front of it keeps them out"
            )
        # Bound, and listening only when there is something to answer with.
        found = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no name of a host"
        raise RecipeError(
            f"serve: cannot listen on {config.host}:{config.port}: {reason}"
        ) from error
    return found


class Server(uvicorn.Server):
    """One server on a socket that is bound.

    Attributes:
        address: Such as http://127.0.0.1:8000, with the real port.
    """

    def __init__(
        self,
        pool: "Pool",
        config: ServeConfig,
        bound: socket.socket,
        *,
        announce: Callable[[str], None],
    ) -> None:
        host, port = bound.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._pool = pool
        self._app: FastAPI = make_app(pool, config)
        self._bound, self._limits, self._announce = bound, config.limits, announce
        self._stopped_at = 0.0
        # A body that is still arriving may take its own time before its request is refused.
        patience = math.ceil(max(self._limits.stop_seconds, self._limits.body_seconds)) + 1
        super().__init__(
            uvicorn.Config(
                self._app, http=_protocol(config), loop="asyncio", ws="none", lifespan="on", log_config=None,
                log_level="error", access_log=False, proxy_headers=False, server_header=False,
                timeout_graceful_shutdown=patience, backlog=self._limits.max_connections,
            )
        )  # fmt: skip

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Warm up, then answer until `should_exit` is set, which SIGTERM and SIGINT do in the main thread.

        Raises:
            ModelError: If a batch does not fit into memory.
        """
        # Before anybody can connect: the server is ready as soon as it answers.
        warm_up = partial(self._pool.warm_up, batch_tokens=self._limits.batch_tokens)
        self._app.state.queue.work_first(warm_up)
        super().run(sockets or [self._bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._announce(self.address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, finish what is queued, and end within `stop_seconds`."""
        queue = self._app.state.queue
        queue.close()
        log.info("stopping: %d tokens wait", queue.tokens)
        late = asyncio.get_running_loop().call_later(self._limits.stop_seconds, queue.abandon)
        await super().shutdown(sockets)
        late.cancel()
        log.info("stopped")

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """Stop at the first signal; at another one later refuse what still waits."""
        now = time.monotonic()
        if not self.should_exit:
            self.should_exit, self._stopped_at = True, now
        elif now - self._stopped_at > SAME_SECONDS:
            # Not here: a handler runs between any two lines of the loop's own work.
            self._loop.call_soon_threadsafe(self._app.state.queue.abandon)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM or SIGINT; uvicorn would raise them again after it, and so fail a stop that went well."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        except ValueError:  # not the main thread, where Python takes no handler
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _protocol(config: ServeConfig) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with this server's limits; uvicorn makes one object of it for each connection."""

    class Bounded(_Bounded):
        limits = config.limits

    return Bounded


class _Bounded(H11Protocol):
    """Ends connections on which no request is under way for too long, and those beyond the most allowed.

    uvicorn alone lets a connection stay that never sends a whole header, that never reads its answer, or that goes on
    sending a body which was refused.
    """

    limits: Any
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._stop_waiting_while_busy()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting_while_busy()

    def send_400_response(self, _: str) -> None:
        self._refuse("Malformed", "this is no HTTP request, or its header is too long")

    def _wait(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self.limits.header_seconds, self._end)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_waiting_while_busy(self) -> None:
        if (
            self.cycle is not None
            and not self.cycle.response_complete
            and not self.flow.write_paused
        ):
            self._stop_waiting()

    def _end(self) -> None:
        if self.transport.is_closing() or self.flow.write_paused:
            # What is left to send is not read by anyone.
            self.transport.abort()
            return
        self._wait()
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            seconds = self.limits.header_seconds
            self._refuse(
                "Timeout", f"the header took longer to arrive than allowed: {seconds:g} seconds"
            )
        else:
            self.transport.close()

    def _refuse(self, kind: ErrorType, sentence: str) -> None:
        """Answer what never became a request, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # in the middle of an answer there is no room for another
            return
        body = ErrorResponse(error=sentence, error_type=kind).model_dump_json().encode()
        length = (b"content-length", str(len(body)).encode())
        headers = [
            *HEADERS,
            (b"content-type", b"application/json"),
            length,
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=STATUSES[kind], headers=headers)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
