"""The app: its routes, its OpenAPI document and its error answers."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from fastapi.telemetry import TelemetryConfig
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from lora_sentiment.serve.answers import Answerer
from lora_sentiment.serve.batching import Queue, call_in_thread
from lora_sentiment.serve.config import ServeConfig
from lora_sentiment.serve.messages import (
    MALFORMED,
    STATUSES,
    AdapterFacts,
    AdaptersResponse,
    AnyRequest,
    AnyResponse,
    BaseFacts,
    ErrorResponse,
    ErrorType,
    RefusalError,
    StatusResponse,
    explain_invalid_body,
)
from lora_sentiment.serve.metrics import CONTENT_TYPE, Metrics
from lora_sentiment.serve.middleware import (
    CLIENT_GONE,
    PREDICT,
    PUBLIC_PATHS,
    Middleware,
    make_refusal,
)

if TYPE_CHECKING:
    # Imports torch, which makes the app slow to load.
    from lora_sentiment.serve.pool import Pool

log = logging.getLogger("lora_sentiment")

WATCH_SECONDS = 2.0
"""Seconds between two looks at the watched folder."""
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""File and content type of each path of the page."""
EXAMPLES: Any = {
    "texts": {
        "value": {"texts": ["A lovely film.", "Dull, long and not worth a cent."], "top_k": 2}
    },
    "explained": {"value": {"texts": ["A lovely film."], "adapter": "imdb_small", "explain": True}},
    "text-embeddings-inference": {
        "value": {"inputs": [["A lovely film."], ["Dull, long and not worth a cent."]]}
    },
}
PREDICT_ERRORS: tuple[ErrorType, ...] = (
    "Malformed", "NotFound", "Timeout", "TooLarge", "UnsupportedMediaType", "Validation", "Overloaded", "Unhealthy",
    "Deadline",
)  # fmt: skip
NO_TELEMETRY: TelemetryConfig = {
    "tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False,
}  # fmt: skip
"""FastAPI would pass requests and their bodies to any exporter that the environment names."""
Result = TypeVar("Result")


def make_app(pool: "Pool", config: ServeConfig) -> FastAPI:
    """Make the app of one server. It has no global state: several may live in one process.

    Returns:
        The app. A stopping server closes its queue, `app.state.queue`.
    """
    metrics = Metrics()
    queue = Queue(pool.compute, limits=config.limits, metrics=metrics)
    answerer = Answerer(pool, queue, limits=config.limits, metrics=metrics)

    @asynccontextmanager
    async def run_tasks(app: FastAPI) -> AsyncIterator[None]:
        app.state.compute_task = asyncio.create_task(queue.run())
        watch_task = asyncio.create_task(_watch(pool, config, queue, metrics))
        yield
        queue.close()
        queue.abandon()
        app.state.compute_task.cancel()
        watch_task.cancel()
        queue.shut_down()
        answerer.shut_down()

    app = FastAPI(
        title="lora_sentiment", version="1", lifespan=run_tasks, docs_url=None, redoc_url=None,
        redirect_slashes=False, telemetry=NO_TELEMETRY,
    )  # fmt: skip
    app.state.queue = queue
    protected = APIRouter()
    if config.api_key:
        # For the OpenAPI document only: the middleware checks the key.
        protected.dependencies.append(Depends(HTTPBearer(auto_error=False)))
        protected.responses.update(_describe_errors("Unauthorized"))
    _add_predict(protected, answerer, config, metrics)
    _add_information(protected, pool, metrics)
    app.include_router(protected)
    _add_checks(app, pool)
    for path, (name, content_type) in PAGE.items():
        content = files("lora_sentiment.serve").joinpath("page", name).read_bytes()
        app.add_route(path, partial(_send_file, content, content_type), include_in_schema=False)
    app.add_exception_handler(RequestValidationError, _refuse_invalid_body)
    app.add_exception_handler(HTTPException, _refuse_request)
    paths = sorted({PREDICT, "/adapters", "/metrics", *PUBLIC_PATHS})
    app.add_middleware(Middleware, config=config, metrics=metrics, paths=paths)
    # FastAPI keeps the document that it makes here.
    schemas = app.openapi()["components"]["schemas"]
    schemas["PredictRequest"]["properties"]["texts"]["maxItems"] = config.limits.max_texts
    return app


def _add_predict(
    router: APIRouter, answerer: Answerer, config: ServeConfig, metrics: Metrics
) -> None:
    adapter = TypeAdapter[Any](AnyResponse)

    @router.post(PREDICT, response_model=AnyResponse, responses=_describe_errors(*PREDICT_ERRORS))
    async def predict(
        body: Annotated[AnyRequest, Body(openapi_examples=EXAMPLES)], request: Request
    ) -> Response:
        """Label texts with the adapter that the request names."""
        answer = await _finish(
            answerer.answer(body), request, seconds=config.limits.deadline_seconds
        )
        if answer is None:
            metrics.abandoned.inc()
            return Response(status_code=CLIENT_GONE)
        return Response(adapter.dump_json(answer), media_type="application/json")


def _add_information(router: APIRouter, pool: "Pool", metrics: Metrics) -> None:
    @router.get("/adapters")
    async def adapters() -> AdaptersResponse:
        """List the loaded adapters."""
        facts = [
            AdapterFacts(
                name=name,
                labels=list(adapter.labels),
                method=adapter.method,
                form=adapter.form,
                num_parameters=adapter.num_parameters,
                max_length=adapter.encoder.max_length,
                truncation=adapter.encoder.truncation,
                sha256=adapter.sha256,
            )
            for name, adapter in sorted(pool.adapters.items())
        ]
        base = BaseFacts(name=pool.base, sha256=pool.base_sha256)
        return AdaptersResponse(base=base, adapters=facts)

    text: dict[int | str, Any] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @router.get("/metrics", response_class=Response, responses=text)
    async def show_metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(metrics.show(), headers={"Content-Type": CONTENT_TYPE})


def _add_checks(app: FastAPI, pool: "Pool") -> None:
    unhealthy = _describe_errors("Unhealthy")

    @app.get("/healthz", responses=unhealthy)
    async def healthz() -> StatusResponse:
        """Check that the process runs and computes."""
        if app.state.compute_task.done():
            raise RefusalError("Unhealthy", "nothing is computed any more; start the server again")
        return StatusResponse()

    @app.get("/readyz", responses=unhealthy)
    async def readyz() -> StatusResponse:
        """Check that an adapter is loaded and the server is not stopping."""
        app.state.queue.check(0)
        if not pool.adapters:
            raise RefusalError("Unhealthy", "no adapter is loaded")
        return StatusResponse()


async def _send_file(content: bytes, content_type: str, _: Request) -> Response:
    return Response(content, headers={"Content-Type": content_type})


async def _refuse_invalid_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return make_refusal(explain_invalid_body(error.errors()))


async def _refuse_request(_: Request, error: Exception) -> Response:
    # The middleware only lets known paths through, so two errors are left.
    assert isinstance(error, HTTPException)
    if error.status_code == STATUSES["Malformed"]:
        return make_refusal(RefusalError("Malformed", MALFORMED))
    assert error.status_code == STATUSES["MethodNotAllowed"]
    headers = error.headers or {}
    message = f"the method is not allowed; allowed: {headers['Allow']}"
    return make_refusal(RefusalError("MethodNotAllowed", message, headers=headers))


async def _finish(
    work: Coroutine[Any, Any, Result], request: Request, *, seconds: float
) -> Result | None:
    """Wait for an answer until the deadline, or until the client disconnects. Then cancel the work.

    Returns:
        The answer, or None if the client disconnected.

    Raises:
        RefusalError: `Deadline` after so many seconds; as the work.
    """
    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        done, _ = await asyncio.wait(
            {task, disconnect}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        disconnect.cancel()
        if not task.done():
            task.cancel()
    if task in done:
        return task.result()
    if disconnect in done:
        return None
    raise RefusalError(
        "Deadline",
        f"no answer within {seconds:g} seconds, the limit for a request; send fewer texts, or try "
        "again later",
    )


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _watch(pool: "Pool", config: ServeConfig, queue: Queue, metrics: Metrics) -> None:
    """Let the pool look at the watched folder again and again, in a thread.

    The process ends only after this thread, so a look ends when the queue is closed.
    """
    loop = asyncio.get_running_loop()
    metrics.set_adapters(pool.adapters)
    while config.watch is not None:
        await asyncio.sleep(WATCH_SECONDS)
        look = loop.run_in_executor(None, call_in_thread, pool.refresh, lambda: queue.closed)
        # `wait` does not raise: the loaded adapters are served whatever happens to the folder.
        await asyncio.wait([look])
        if error := look.exception():
            log.error("%r: the watched folder cannot be read", str(config.watch), exc_info=error)
        metrics.set_adapters(pool.adapters)


def _describe_errors(*kinds: ErrorType) -> dict[int | str, dict[str, Any]]:
    """Return the error answers for the OpenAPI document."""
    answers: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        answers[STATUSES[kind]] = {"model": ErrorResponse, "description": kind}
    if "Overloaded" in kinds:
        schema = {"type": "integer", "minimum": 1}
        header = {"description": "Seconds to wait.", "schema": schema}
        answers[STATUSES["Overloaded"]]["headers"] = {"Retry-After": header}
    return answers
