"""From hidden states to embeddings: which are pooled, how they are cut and scaled, how they reach the host."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from charonia.core.step import StepPlan
from charonia.pooling_params import PoolingParams
from charonia.worker.batch import StepLayout
from charonia.worker.logprobs import sent_to_host


def embed(pooled: torch.Tensor, params: PoolingParams) -> torch.Tensor:
    """The embedding of a pooled hidden state: `[H]` to `[dimensions]`, fp32. A vector of zeros stays what it is."""
    vector = pooled.float()[: params.dimensions]
    return torch.nn.functional.normalize(vector, dim=0) if params.normalize else vector


@dataclass(frozen=True, slots=True)
class PendingEmbeddings:
    """Embeddings of one step by row, fp32, on their way to the host."""

    vectors: dict[int, torch.Tensor] = field(default_factory=dict)

    def collect(self) -> tuple[dict[int, bytes], list[int]]:
        """Little-endian values by row, and the rows whose values are not finite; for after the step has completed."""
        found: dict[int, bytes] = {}
        failed: list[int] = []
        for row, vector in self.vectors.items():
            if bool(torch.isfinite(vector).all()):
                found[row] = vector.numpy().astype("<f4", copy=False).tobytes()
            else:
                failed.append(row)
        return found, failed


@dataclass(slots=True)
class _PoolingRow:
    """kept: what earlier chunks brought, fp32 [H]: the sum of their hidden states (mean), or the first one (cls)."""

    params: PoolingParams
    num_prompt: int
    kept: torch.Tensor | None = None


class Pooler:
    """Pools the rows that ask for it, chunk by chunk, while the other rows of the batch sample.

    A row that enters again, after preemption, starts over.
    """

    def __init__(self, norm: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """norm: the model's final one, `[N, H]` to `[N, H]`: hidden states come in front of it."""
        self._norm = norm
        self._rows: dict[int, _PoolingRow] = {}

    def apply(self, plan: StepPlan) -> None:
        """Take note of rows that come and go; before the plan's step."""
        for row in plan.freed_rows:
            self._rows.pop(row, None)
        for new in plan.new_rows:
            if new.pooling is not None:
                self._rows[new.row] = _PoolingRow(new.pooling, new.num_prompt_tokens)

    def needs_all(self, layout: StepLayout) -> bool:
        """Whether a step's other hidden states are pooled beside the last of each entry."""
        return bool(self._rows) and any(
            row in self._rows and self._rows[row].params.pooling_type != "last"
            for row in layout.rows[layout.num_decodes :].tolist()
        )

    def pool(
        self, layout: StepLayout, last: torch.Tensor, hidden: torch.Tensor | None
    ) -> PendingEmbeddings | None:
        """Account for a step's hidden states; the embeddings that it completes, None if no row asks for one.

        last: [B, H], of each entry's last token. hidden: [T, H], of all tokens; only if `needs_all`.
        """
        if not self._rows:
            return None
        done = PendingEmbeddings()
        starts = layout.query_start_loc()
        for entry in range(layout.num_decodes, layout.num_entries):
            row = int(layout.rows[entry])
            state = self._rows.get(row)
            if state is None:
                continue
            first, length = int(layout.starts[entry]), int(layout.lengths[entry])
            if hidden is not None:
                self._keep(state, hidden[int(starts[entry]) :][:length], begins=first == 0)
            if first + length == state.num_prompt:
                pooled = self._pooled(state, last[entry : entry + 1])
                done.vectors[row] = sent_to_host(embed(pooled, state.params))
        return done

    def dry_run(self, hidden: torch.Tensor) -> None:
        """Launch what `pool` launches."""
        embed(self._norm(hidden)[0], PoolingParams(normalize=True))

    def _keep(self, state: _PoolingRow, hidden: torch.Tensor, *, begins: bool) -> None:
        """Take what a chunk's hidden states [N, H] add to what is kept of those before."""
        if state.params.pooling_type == "mean":
            part = self._norm(hidden).float().sum(dim=0)
            state.kept = part if state.kept is None else state.kept + part
        elif state.params.pooling_type == "cls" and begins:
            state.kept = self._norm(hidden[:1])[0].float()

    def _pooled(self, state: _PoolingRow, last: torch.Tensor) -> torch.Tensor:
        """[H], once the prompt is computed to its end. last: [1, H]."""
        if state.params.pooling_type == "last":
            return self._norm(last)[0]
        assert state.kept is not None, "the first chunk has been kept"
        return state.kept / state.num_prompt if state.params.pooling_type == "mean" else state.kept
