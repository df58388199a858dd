"""How a request is sampled that does not say it itself."""

from typing import Any

from charonia_client.gateway.context import RequestContext
from charonia_client.gateway.settings import GatewaySettings
from charonia_client.gateway.triton_model import TritonModel


async def recommended_sampling(
    settings: GatewaySettings, model: TritonModel, context: RequestContext
) -> dict[str, Any]:
    """Sampling parameters that the checkpoint recommends, as vLLM's server takes them; none where that is off."""
    if not settings.recommended_sampling:
        return {}
    return dict((await model.info(context)).recommended_sampling)
