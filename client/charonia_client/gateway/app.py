"""The gateway as an ASGI application."""

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from charonia_client.gateway.auth import HEALTH_PATH, ApiKeyAuth
from charonia_client.gateway.body_limit import BodyLimit
from charonia_client.gateway.chat_page import chat_page_routes
from charonia_client.gateway.errors import ErrorBody, install_error_handlers
from charonia_client.gateway.gateway_state import Gateway
from charonia_client.gateway.observe import GatewayMetrics, Observe, metrics_routes
from charonia_client.gateway.output_formats import check_parser_names
from charonia_client.gateway.routes import chat, completions, embeddings, models, tokens
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.triton_model import TritonModel

_PAGE_PATHS = ("/", "/chat/*")


def create_app(settings: GatewaySettings, metrics_dir: str | None = None) -> FastAPI:
    """Build the application. Raises ValueError for settings that cannot be: a wrong address or parser.

    metrics_dir: see `GatewayMetrics`.
    """
    check_parser_names(settings)
    model = TritonModel(settings.triton, settings.model, timeout_s=settings.request_timeout_s)
    tracing = _load_tracing(settings.otlp_traces_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await model.aclose()
        if tracing is not None:
            await asyncio.to_thread(tracing.tracer.stop)

    # The pages with documentation would fetch their scripts from elsewhere.
    app = FastAPI(
        title="Charonia",
        description="An OpenAI-compatible API for a model in Triton Inference Server.",
        docs_url=None,
        redoc_url=None,
        responses={"default": {"model": ErrorBody, "description": "An error, in the form of the OpenAI API"}},
        lifespan=lifespan,
    )
    app.state.gateway = Gateway(settings, model)
    install_error_handlers(app)
    metrics = GatewayMetrics(metrics_dir)
    for router in (chat.router, completions.router, embeddings.router, tokens.router, models.router):
        app.include_router(router)
    app.include_router(metrics_routes(metrics))
    if settings.chat_page:
        app.include_router(chat_page_routes())
    _add_middleware(app, settings, metrics, tracing)
    return app


class _Tracing(NamedTuple):
    middleware: Any
    tracer: Any


def _load_tracing(endpoint: str | None) -> _Tracing | None:
    """What spans need; imported only where they are asked for. Raises ValueError where it is missing."""
    if endpoint is None:
        return None
    try:
        module = importlib.import_module("charonia_client.gateway.tracing")
    except ModuleNotFoundError as error:
        raise ValueError(f"tracing needs the package {error.name}: pip install 'charonia[tracing]'") from None
    return _Tracing(module.Trace, module.GatewayTracer.over_http(endpoint))


def _add_middleware(
    app: FastAPI, settings: GatewaySettings, metrics: GatewayMetrics, tracing: _Tracing | None
) -> None:
    """The last one added is the first to see a request."""
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.api_keys:
        pages = _PAGE_PATHS if settings.chat_page and settings.open_chat_page else ()
        app.add_middleware(ApiKeyAuth, keys=settings.api_keys, open_paths=(HEALTH_PATH, *pages))
    if tracing is not None:
        app.add_middleware(tracing.middleware, tracer=tracing.tracer)
    app.add_middleware(Observe, metrics=metrics)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
