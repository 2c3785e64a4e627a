"""The app: routes, what OpenAPI says of them, and how a fault becomes an answer."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from fastapi.telemetry import TelemetryConfig
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from lora_sentiment.serve.answers import Answerer
from lora_sentiment.serve.batching import Queue, work_in_thread
from lora_sentiment.serve.config import ServeConfig
from lora_sentiment.serve.messages import (
    MALFORMED,
    STATUSES,
    AdapterFacts,
    AdaptersResponse,
    Asked,
    BaseFacts,
    ErrorResponse,
    ErrorType,
    Predicted,
    PredictRequest,
    RefusalError,
    StatusResponse,
    read_request,
)
from lora_sentiment.serve.metrics import CONTENT_TYPE, Metrics
from lora_sentiment.serve.middleware import CLIENT_GONE, PREDICT, Guard, make_refusal

if TYPE_CHECKING:
    from lora_sentiment.serve.pool import Pool

log = logging.getLogger("lora_sentiment")

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""Path to file of the page and its type."""
EXAMPLES = {
    "texts": {
        "value": {"texts": ["A lovely film.", "Dull, long and not worth a cent."], "top_k": 2}
    },
    "explained": {"value": {"texts": ["A lovely film."], "adapter": "imdb_small", "explain": True}},
    "text-embeddings-inference": {
        "value": {"inputs": [["A lovely film."], ["Dull, long and not worth a cent."]]}
    },
}
_EXPLAINED: dict[ErrorType, str] = {
    "Malformed": MALFORMED,
    "Unauthorized": "this server needs its key: send the header Authorization: Bearer KEY",
    "NotFound": "adapter: 'imdb' is not loaded; there is imdb_small",
    "Timeout": "the body took longer to arrive than allowed: 10 seconds",
    "TooLarge": "texts: found 200; allowed: at most 128 a request",
    "UnsupportedMediaType": "the body's Content-Type must be application/json",
    "Validation": "top_k: Input should be greater than or equal to 1",
    "Overloaded": "131,000 tokens wait already and this request makes at least 300; allowed: 131,072 together",
    "Unhealthy": "no adapter is loaded",
    "Deadline": "no answer within the 30 seconds that a request may take; send fewer texts, or try again later",
}
NO_TELEMETRY: TelemetryConfig = {
    "tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False,
}  # fmt: skip
"""FastAPI would hand requests, bodies among them, to any exporter that the environment names."""
_REFERENCE = "#/components/schemas/{model}"
Result = TypeVar("Result")


def make_app(pool: "Pool", config: ServeConfig) -> FastAPI:
    """Make the app of one server. Nothing is global: several may live in one process.

    Returns:
        The app; `app.state.queue` is its line, which a stopping server closes.
    """
    metrics = Metrics()
    queue = Queue(pool.compute, limits=config.limits, metrics=metrics)
    answerer = Answerer(pool, queue, limits=config.limits, metrics=metrics)

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        app.state.running = asyncio.create_task(queue.run())
        watching = asyncio.create_task(_watch(pool, config, metrics, stopped=lambda: queue.closed))
        yield
        queue.close()
        queue.abandon()
        for task in (app.state.running, watching):
            task.cancel()
        queue.shut()
        answerer.shut()

    app = FastAPI(
        title="lora_sentiment", version="1", lifespan=live, docs_url=None, redoc_url=None,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
    )  # fmt: skip
    app.state.queue = queue
    _add_predict(app, answerer, config, metrics)
    _add_facts(app, pool, config, metrics)
    _add_page(app)
    _add_handlers(app)
    routes = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Guard, config=config, metrics=metrics, routes=routes)
    # Made once and kept by FastAPI, which does not read this body itself; the limits are this server's own.
    schemas = app.openapi()["components"]["schemas"]
    schemas |= TypeAdapter[Any](Asked).json_schema(ref_template=_REFERENCE)["$defs"]
    schemas["PredictRequest"]["properties"]["texts"]["maxItems"] = config.limits.max_texts
    return app


def _add_predict(app: FastAPI, answerer: Answerer, config: ServeConfig, metrics: Metrics) -> None:
    answers = TypeAdapter[Any](Predicted)
    kinds: list[ErrorType] = [
        kind for kind in _EXPLAINED if kind != "Unauthorized" or config.api_key
    ]

    forms = [{"$ref": _REFERENCE.format(model=form.__name__)} for form in get_args(Asked)]
    content = {"application/json": {"schema": {"anyOf": forms}, "examples": EXAMPLES}}

    @app.post(
        PREDICT, response_model=Predicted, responses=_errors(*kinds), dependencies=_bearer(config),
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )  # fmt: skip
    async def predict(request: Request) -> Response:
        """Label texts, each by the adapter that the request names."""
        asked = read_request(await request.body(), config.limits)
        work = (
            answerer.predict(asked)
            if isinstance(asked, PredictRequest)
            else answerer.predict_as_tei(asked)
        )
        answer = await _finish(work, request, seconds=config.limits.deadline_seconds)
        if answer is None:
            metrics.abandoned.inc()
            return Response(status_code=CLIENT_GONE)
        return Response(answers.dump_json(answer), media_type="application/json")


def _add_facts(app: FastAPI, pool: "Pool", config: ServeConfig, metrics: Metrics) -> None:
    needs_key = _errors("Unauthorized") if config.api_key else {}

    @app.get("/adapters", responses=needs_key, dependencies=_bearer(config))
    async def adapters() -> AdaptersResponse:
        """Say what is loaded."""
        found = [
            AdapterFacts(
                name=name, labels=list(own.labels), method=own.method, form=own.form,
                num_parameters=own.num_parameters, max_length=own.encoder.max_length,
                truncation=own.encoder.truncation, sha256=own.sha256,
            )
            for name, own in sorted(pool.served.items())
        ]  # fmt: skip
        return AdaptersResponse(
            base=BaseFacts(name=pool.base, sha256=pool.base_sha256), adapters=found
        )

    @app.get("/healthz", responses=_errors("Unhealthy"))
    async def healthz() -> StatusResponse:
        """Say that the process lives and computes."""
        if app.state.running.done():
            raise RefusalError("Unhealthy", "nothing computes any more; start the server again")
        return StatusResponse()

    @app.get("/readyz", responses=_errors("Unhealthy"))
    async def readyz() -> StatusResponse:
        """Say that a prediction would be taken: an adapter is loaded and the server is not stopping."""
        app.state.queue.check(0)
        if not pool.served:
            raise RefusalError("Unhealthy", "no adapter is loaded")
        return StatusResponse()

    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
    }

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**text, **needs_key},
        dependencies=_bearer(config),
    )
    async def show_metrics() -> Response:
        """Count, for Prometheus."""
        return Response(metrics.show(), headers={"Content-Type": CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    for path, (name, kind) in PAGE.items():
        content = files("lora_sentiment.serve").joinpath("page", name).read_bytes()
        app.add_route(path, partial(_show, content, kind), methods=["GET"], include_in_schema=False)


async def _show(content: bytes, kind: str, _: Request) -> Response:
    return Response(content, headers={"Content-Type": kind})


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(RefusalError)
    async def refuse(_: Request, error: RefusalError) -> Response:
        return make_refusal(error)

    @app.exception_handler(HTTPException)
    async def refuse_request(_: Request, error: HTTPException) -> Response:
        # Nothing else is raised: the guard lets known paths through alone, and no body is read by FastAPI.
        assert error.status_code == STATUSES["MethodNotAllowed"]
        allowed = (error.headers or {}).get("Allow", "")
        response = make_refusal(
            RefusalError("MethodNotAllowed", f"this path takes {allowed} alone")
        )
        response.headers["Allow"] = allowed
        return response


async def _finish(
    work: Coroutine[Any, Any, Result], request: Request, *, seconds: float
) -> Result | None:
    """Wait for an answer as long as somebody else does; what is given up leaves the line.

    Returns:
        The answer; None where the client went away.

    Raises:
        RefusalError: What the work raises; `Deadline` after so many seconds.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_wait_until_gone(request))
    try:
        done, _ = await asyncio.wait(
            {task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
    if task in done:
        return task.result()
    if gone in done:
        return None
    raise RefusalError(
        "Deadline",
        f"no answer within the {seconds:g} seconds that a request may take; send fewer texts, or try again later",
    )


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _watch(
    pool: "Pool", config: ServeConfig, metrics: Metrics, *, stopped: Callable[[], bool]
) -> None:
    """Let the pool look at its folder now and then, in a thread; a process ends only after it, so a stop ends it."""
    loop = asyncio.get_running_loop()
    metrics.keep(pool.served)
    while config.watch is not None:
        await asyncio.sleep(config.limits.watch_seconds)
        looked = loop.run_in_executor(None, work_in_thread, pool.refresh, stopped)
        # What is loaded goes on being served whatever the folder holds.
        await asyncio.wait([looked])
        if error := looked.exception():
            log.error("%r could not be looked at", str(config.watch), exc_info=error)
        metrics.keep(pool.served)


def _bearer(config: ServeConfig) -> list[Any]:
    """For OpenAPI alone: the guard has checked the key already."""
    return [Depends(HTTPBearer(auto_error=False))] if config.api_key else []


def _errors(*kinds: ErrorType) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of errors."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        example = {"error": _EXPLAINED[kind], "error_type": kind}
        found[STATUSES[kind]] = {
            "model": ErrorResponse,
            "description": kind,
            "content": {"application/json": {"example": example}},
        }
    if STATUSES["Overloaded"] in found:
        found[STATUSES["Overloaded"]]["headers"] = {
            "Retry-After": {
                "description": "Seconds to wait.",
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    return found
