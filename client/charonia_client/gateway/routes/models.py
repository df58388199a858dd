"""GET /v1/models, /health and /version."""

import importlib.metadata
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from charonia_client.gateway.auth import HEALTH_PATH
from charonia_client.gateway.context import context_of
from charonia_client.gateway.errors import ApiError
from charonia_client.gateway.gateway_state import Gateway, gateway_of
from charonia_client.gateway.sse import unless_disconnected
from charonia_client.gateway.triton_model import ModelInfo

router = APIRouter()


@router.get("/v1/models", summary="The names of the model")
async def list_models(request: Request) -> Response:
    """Every name by which the model may be asked for."""
    gateway = gateway_of(request)
    info = await unless_disconnected(request, gateway.model.info(context_of(request)))
    cards = [_card(gateway, name, info) for name in gateway.settings.names]
    return Response(to_json({"object": "list", "data": cards}), media_type="application/json")


@router.get("/v1/models/{name:path}", summary="One name of the model")
async def read_model(name: str, request: Request) -> Response:
    """What is known of the model."""
    gateway = gateway_of(request)
    served = gateway.served_name(name)
    info = await unless_disconnected(request, gateway.model.info(context_of(request)))
    return Response(to_json(_card(gateway, served, info)), media_type="application/json")


def _card(gateway: Gateway, name: str, info: ModelInfo) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "charonia",
        "root": gateway.model.name,
        "parent": None,
        "max_model_len": info.max_model_len,
    }


@router.head(HEALTH_PATH, include_in_schema=False)
@router.get(HEALTH_PATH, summary="Whether requests would be taken now")
async def health(request: Request) -> Response:
    """200 if the model is ready in Triton, else 503."""
    if await unless_disconnected(request, gateway_of(request).model.is_ready()):
        return Response(status_code=200)
    raise ApiError("the model is not ready", status=503)


@router.get("/version", summary="The gateway's version")
async def version() -> dict[str, str]:
    """The version of the package."""
    try:
        return {"version": importlib.metadata.version("charonia")}
    except importlib.metadata.PackageNotFoundError:  # a checkout on sys.path, not installed
        return {"version": "unknown"}
