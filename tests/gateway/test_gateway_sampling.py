"""What a checkpoint recommends is how requests are sampled that leave it open."""

import httpx
import pytest
from charonia_client.gateway.settings import GatewaySettings
from support.gateway import running_gateway

RECOMMENDED = {"temperature": 0.6, "top_k": 20, "max_tokens": 9}
BODIES = {
    "/v1/completions": {"prompt": "a b", "max_tokens": None},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a b"}]},
}


@pytest.mark.parametrize("route", list(BODIES))
def test_recommended_sampling(scripted, fake, route):
    fake.recommended_sampling = RECOMMENDED
    with running_gateway(GatewaySettings(triton=scripted.url)) as url:
        for given in ({}, {"temperature": 0.0, "top_p": 0.5}, {"max_tokens": 3}):
            answer = httpx.post(f"{url}{route}", json={**BODIES[route], **given}, timeout=60)
            assert answer.status_code == 200, answer.text
            assert fake.last.sampling == RECOMMENDED | given
        scored = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 0, "echo": True})
        assert scored.status_code == 200
        assert fake.last.sampling["max_tokens"] == 1


def test_recommended_sampling_can_be_left(scripted, fake):
    fake.recommended_sampling = RECOMMENDED
    settings = GatewaySettings(triton=scripted.url, recommended_sampling=False)
    with running_gateway(settings) as url:
        httpx.post(f"{url}/v1/completions", json={"prompt": "a b"}, timeout=60).raise_for_status()
    assert fake.last.sampling == {"max_tokens": 16}
