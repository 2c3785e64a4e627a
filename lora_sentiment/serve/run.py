"""Run the HTTP server. On SIGTERM, answer all queued requests, then stop."""

import asyncio
import ipaddress
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_sentiment.errors import RecipeError
from lora_sentiment.serve.app import make_app
from lora_sentiment.serve.config import Limits, ServeConfig
from lora_sentiment.serve.messages import ErrorType, RefusalError
from lora_sentiment.serve.middleware import HEADERS, make_refusal

if TYPE_CHECKING:
    # Imports torch, which takes seconds.
    from lora_sentiment.serve.pool import Pool

log = logging.getLogger("lora_sentiment")

SAME_SIGNAL_SECONDS = 1.0
"""Signals closer than this count as one. A terminal sends Ctrl-C to every process, and a launcher
sends it again."""


def serve(config: ServeConfig, *, announce: Callable[[str], None]) -> None:
    """Load adapters and answer requests until SIGTERM or SIGINT. Then answer the queued requests.

    Args:
        config: The settings.
        announce: Called with the address as soon as requests are accepted.

    Raises:
        RecipeError: If the server cannot listen on the address, or the address is not loopback and
            there is no key.
        AdapterError: As `load_pool`.
        ModelError: As `load_pool`; if a batch does not fit into memory.
    """
    # Bind first: torch and the adapters take long to load, and the address may be taken or not
    # allowed.
    bound = bind(config)
    try:
        from lora_sentiment.serve.pool import load_pool

        pool = load_pool(config.adapters, watch=config.watch, base=config.base, dtype=config.dtype)
        Server(pool, config, bound, announce=announce).run()
    finally:
        bound.close()


def bind(config: ServeConfig) -> socket.socket:
    """Bind a socket to the address of the settings. It does not listen yet.

    Raises:
        RecipeError: If this fails, or the address is not loopback and there is neither a key nor
            `no_api_key`.
    """
    try:
        addresses = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = addresses[0]
        is_loopback = ipaddress.ip_address(address[0]).is_loopback
        if not (is_loopback or config.api_key or config.no_api_key):
            raise RecipeError(
                f"serve: --host {config.host} can be reached from other machines: give "
                "--api-key-file FILE, or --no-api-key if something in front of the server keeps "
                "strangers out"
            )
        bound = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except UnicodeError as error:
        raise RecipeError(
            f"serve: cannot listen on {config.host}:{config.port}: this is not a host name"
        ) from error
    except OSError as error:
        raise _make_listen_error(f"{config.host}:{config.port}", error) from error
    return bound


def _make_listen_error(address: str, error: OSError) -> RecipeError:
    return RecipeError(f"serve: cannot listen on {address}: {error.strerror}")


class Server(uvicorn.Server):
    """One server on a bound socket.

    Attributes:
        address: Its address with the real port, such as http://127.0.0.1:8000.
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
        self._bound = bound
        self._limits = config.limits
        self._announce = announce
        self._stopped_at = 0.0
        # A body that is still arriving may use its own time before its request is refused.
        stop_seconds = math.ceil(max(self._limits.stop_seconds, self._limits.body_seconds)) + 1
        protocol: Any = partial(_LimitedProtocol, limits=config.limits)
        super().__init__(
            uvicorn.Config(
                self._app, http=protocol, loop="asyncio", ws="none", lifespan="on", log_config=None,
                log_level="error", access_log=False, proxy_headers=False, server_header=False,
                timeout_graceful_shutdown=stop_seconds, backlog=self._limits.max_connections,
            )
        )  # fmt: skip

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Warm up, then answer until `should_exit` is set.

        SIGTERM and SIGINT set it in the main thread.

        Raises:
            ModelError: If a batch does not fit into memory.
        """
        # Before the socket listens: a server that can be reached is ready.
        warm_up = partial(self._pool.warm_up, batch_tokens=self._limits.batch_tokens)
        self._app.state.queue.call_first(warm_up)
        super().run(sockets or [self._bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and announce the address."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except OSError as error:  # another server was bound to the address too, and was faster
            raise _make_listen_error(self.address.removeprefix("http://"), error) from error
        self._announce(self.address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, answer the queued ones, and end within `stop_seconds`."""
        queue = self._app.state.queue
        queue.close()
        log.info("stopping: %d tokens wait", queue.num_tokens)
        timer = self._loop.call_later(self._limits.stop_seconds, queue.abandon)
        await super().shutdown(sockets)
        timer.cancel()
        log.info("stopped")

    async def on_tick(self, counter: int) -> bool:
        """Close idle connections. uvicorn calls this ten times a second."""
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, _LimitedProtocol)
            connection.check_idle(now)
        return await super().on_tick(counter)

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """Stop at the first signal. At a second one, refuse all requests that still wait.

        uvicorn's own handler would raise the signal again after the stop, and so turn its exit code
        into a failure.
        """
        now = time.monotonic()
        if not self.should_exit:
            self.should_exit = True
            self._stopped_at = now
        elif now - self._stopped_at > SAME_SIGNAL_SECONDS:
            # A signal handler runs between any two lines of the loop's work, so the loop makes the
            # call.
            self._loop.call_soon_threadsafe(self._app.state.queue.abandon)


class _LimitedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with limits on the number and the time of connections.

    No server has all that SECURITY.md promises (looked at in November 2026):
    - uvicorn 0.54 keeps a connection that sends no header, sends a refused body for ever, or reads
      no answer.
    - hypercorn 0.18 only limits the time between two reads, so one byte every few seconds keeps a
      connection.
    - granian 2.8 limits header time and size, but not answers that nobody reads, nor the number of
      connections. It cannot use a bound socket, and its embedded server is experimental.
    """

    def __init__(self, *arguments: Any, limits: Limits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._idle_cycle: object = None
        self._idle_since = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            transport.abort()

    def send_400_response(self, _: str) -> None:
        self._refuse("Malformed", "this is not an HTTP request, or its header is too long")

    def check_idle(self, now: float) -> None:
        """Close a connection that waited too long for a header, or for its client to read.

        The app limits the time from a request header to its answer.
        """
        # A cycle is one request and its answer.
        is_answering = self.cycle is not None and not self.cycle.response_complete
        is_busy = is_answering and not self.flow.write_paused
        if is_busy or self.cycle is not self._idle_cycle:
            self._idle_cycle = self.cycle
            self._idle_since = now
            return
        seconds = self._limits.header_seconds
        if now - self._idle_since < seconds:
            return
        self._idle_since = now
        if self.transport.is_closing() or self.flow.write_paused:
            # The client does not read the rest of the answer.
            self.transport.abort()
        elif self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            message = f"the header took longer to arrive than allowed: {seconds:g} seconds"
            self._refuse("Timeout", message)
        else:
            self.transport.close()

    def _refuse(self, kind: ErrorType, message: str) -> None:
        """Answer a request that never became whole, and close the connection."""
        # There is no room for an error in the middle of an answer.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = make_refusal(RefusalError(kind, message))
            headers = [*answer.raw_headers, *HEADERS, (b"connection", b"close")]
            response = h11.Response(status_code=answer.status_code, headers=headers)
            for event in (response, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
