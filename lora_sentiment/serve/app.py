"""The app: its routes, its OpenAPI document and its error answers."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from fastapi.telemetry import TelemetryConfig
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from lora_sentiment import __version__
from lora_sentiment.serve.answers import NUM_THREADS, Answerer, choose_adapter
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
    ClassifierFacts,
    ErrorResponse,
    ErrorType,
    HfRequest,
    InfoResponse,
    RefusalError,
    Scores,
    StatusResponse,
    explain_invalid_body,
)
from lora_sentiment.serve.metrics import CONTENT_TYPE, Metrics
from lora_sentiment.serve.middleware import (
    CLIENT_GONE,
    PREDICT,
    PREDICT_HF,
    PUBLIC_PATHS,
    Middleware,
    make_refusal,
)
from lora_sentiment.tasks.label_sets import LABEL_SCORES

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
EXAMPLES_HF: Any = {
    "one text": {"value": {"inputs": "A lovely film."}},
    "several": {
        "value": {
            "inputs": ["A lovely film.", "Dull, long and not worth a cent."],
            "parameters": {"top_k": 1, "function_to_apply": "none"},
        }
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
AdapterName = Annotated[str | None, Query(examples=["imdb_small"])]
"""Name of the adapter, in the address. May be left out if only one is loaded."""
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
        app.state.compute_task.add_done_callback(_log_end)
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
    _add_information(protected, pool, config, metrics)
    app.include_router(protected)
    _add_checks(app, pool)
    for path, (name, content_type) in PAGE.items():
        content = files("lora_sentiment.serve").joinpath("page", name).read_bytes()
        app.add_route(path, partial(_send_file, content, content_type), include_in_schema=False)
    app.add_exception_handler(RequestValidationError, _refuse_invalid_body)
    app.add_exception_handler(HTTPException, _refuse_request)
    paths = sorted({PREDICT, "/adapters", "/info", "/metrics", *PUBLIC_PATHS})
    app.add_middleware(Middleware, config=config, metrics=metrics, paths=paths)
    # FastAPI keeps the document that it makes here.
    schemas = app.openapi()["components"]["schemas"]
    schemas["PredictRequest"]["properties"]["texts"]["maxItems"] = config.limits.max_texts
    return app


def _add_predict(
    router: APIRouter, answerer: Answerer, config: ServeConfig, metrics: Metrics
) -> None:
    writer = TypeAdapter[Any](AnyResponse)
    errors = _describe_errors(*PREDICT_ERRORS)

    async def respond(work: Coroutine[Any, Any, AnyResponse], request: Request) -> Response:
        answer = await _finish(work, request, seconds=config.limits.deadline_seconds)
        if answer is None:
            metrics.abandoned.inc()
            return Response(status_code=CLIENT_GONE)
        return Response(writer.dump_json(answer), media_type="application/json")

    @router.post(PREDICT, response_model=AnyResponse, responses=errors)
    async def predict(
        body: Annotated[AnyRequest, Body(openapi_examples=EXAMPLES)], request: Request
    ) -> Response:
        """Label texts with the adapter that the request names."""
        return await respond(answerer.answer(body), request)

    @router.post(PREDICT_HF, response_model=list[Scores], responses=errors)
    async def predict_hf(
        body: Annotated[HfRequest, Body(openapi_examples=EXAMPLES_HF)],
        request: Request,
        adapter: AdapterName = None,
    ) -> Response:
        """Label texts for Hugging Face's clients: a list of labels for each text."""
        return await respond(answerer.answer_hf(body, adapter), request)


def _add_information(
    router: APIRouter, pool: "Pool", config: ServeConfig, metrics: Metrics
) -> None:
    @router.get("/adapters")
    async def adapters() -> AdaptersResponse:
        """List the loaded adapters."""
        facts = [
            AdapterFacts(
                name=name,
                task=adapter.task.name,
                answer_columns=list(adapter.task.answer_columns),
                labels=list(adapter.labels),
                method=adapter.method,
                form=adapter.form,
                num_parameters=adapter.num_parameters,
                max_length=adapter.encoder.max_length,
                truncation=adapter.encoder.truncation,
                reads_pairs=adapter.encoder.reads_pairs,
                has_label_sets=LABEL_SCORES in (adapter.calibration or {}),
                sha256=adapter.sha256,
            )
            for name, adapter in sorted(pool.adapters.items())
        ]
        base = BaseFacts(name=pool.base, sha256=pool.base_sha256)
        return AdaptersResponse(base=base, adapters=facts)

    @router.get("/info", responses=_describe_errors("NotFound", "Validation", "Unhealthy"))
    async def info(adapter: AdapterName = None) -> InfoResponse:
        """Describe one adapter and the limits, as text-embeddings-inference does."""
        chosen = choose_adapter(pool.adapters, adapter)
        ids = {label: i for i, label in enumerate(chosen.labels)}
        names = {str(i): label for label, i in ids.items()}
        limits = config.limits
        return InfoResponse(
            model_id=chosen.name,
            model_sha=chosen.sha256,
            model_dtype=pool.dtype,
            served_model_name=chosen.name,
            model_type={"classifier": ClassifierFacts(id2label=names, label2id=ids)},
            max_concurrent_requests=limits.max_requests,
            max_input_length=chosen.encoder.max_length,
            max_batch_tokens=limits.batch_tokens,
            max_client_batch_size=limits.max_texts,
            auto_truncate=limits.on_long == "truncate",
            tokenization_workers=NUM_THREADS,
            version=__version__,
        )

    text: dict[int | str, Any] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @router.get("/metrics", response_class=Response, responses=text)
    async def show_metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(metrics.show(), headers={"Content-Type": CONTENT_TYPE})


def _log_end(compute_task: asyncio.Task[None]) -> None:
    if not compute_task.cancelled():
        log.error("the queue ended, and nothing is computed", exc_info=compute_task.exception())


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

    @app.get("/health", response_class=Response, responses=unhealthy)
    async def health() -> Response:
        """Make both checks. Like text-embeddings-inference, return an empty body."""
        await healthz()
        await readyz()
        return Response()


async def _send_file(content: bytes, content_type: str, _: Request) -> Response:
    return Response(content, headers={"Content-Type": content_type})


async def _refuse_invalid_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return make_refusal(explain_invalid_body(error.errors()))


async def _refuse_request(request: Request, error: Exception) -> Response:
    # The middleware only lets known paths through, so two errors are left.
    assert isinstance(error, HTTPException)
    if error.status_code == STATUSES["Malformed"]:
        return make_refusal(RefusalError("Malformed", MALFORMED))
    assert error.status_code == STATUSES["MethodNotAllowed"]
    headers = error.headers or {}
    if request.url.path == PREDICT_HF:
        # The router names the methods of one of its two routes only.
        headers = {"Allow": "GET, HEAD, POST"}
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
