"""Body of an embedding request."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from charonia_client.gateway.protocol.completions import Tokens, as_prompts

MAX_INPUTS = 2048
MAX_DIMENSIONS = 1 << 16

Inputs = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
)


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(extra="allow")
    input: Inputs
    model: str | None = Field(None, max_length=1024)
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1, le=MAX_DIMENSIONS)
    user: str | None = None

    def inputs(self) -> list[str] | list[list[int]]:
        """The inputs one by one, all texts or all token ids."""
        return as_prompts(self.input)
