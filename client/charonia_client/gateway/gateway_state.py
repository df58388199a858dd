"""What the routes of one gateway share."""

import time
from dataclasses import dataclass

from fastapi import Request

from charonia_client.gateway.errors import ApiError
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.triton_model import TritonModel


@dataclass(frozen=True, slots=True)
class Gateway:
    """The settings, and the model that is served."""

    settings: GatewaySettings
    model: TritonModel

    def served_name(self, asked: str | None) -> str:
        """The name under which to report the model. Raises `ApiError` (404) for one that is not served."""
        names = self.settings.names
        if not asked:
            return names[0]
        if asked in names:
            return asked
        raise ApiError(
            f"the model {asked[:200]!r} does not exist; served is {names[0]!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves a request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def now() -> int:
    """Seconds since the epoch, for `created`."""
    return int(time.time())
