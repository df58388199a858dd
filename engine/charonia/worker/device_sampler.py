"""The GPU's sampler: kernels that read what rows ask for from the rows' own records."""

import torch
from charonia_kernels import gpu

from charonia.worker.batch import InputBatch, StepLayout
from charonia.worker.results import TokenOutbox
from charonia.worker.rows import RequestRows
from charonia.worker.sampling import Draw
from charonia.worker.sampling_mode import SamplingMode


class DeviceSampler:
    """Draws with `charonia_kernels`' sampling kernels, into the outbox."""

    def __init__(self, rows: RequestRows, outbox: TokenOutbox, max_num_seqs: int, device: torch.device) -> None:
        self._rows = rows
        self._outbox = outbox
        self._scratch = gpu.SampleScratch.allocate(max_num_seqs, device)
        self._thresholds = torch.zeros(max_num_seqs, device=device)

    def mode(self) -> SamplingMode:
        """As `Sampler`."""
        return self._rows.most_demanding_mode

    def draw(self, logits: torch.Tensor, batch: InputBatch, mode: SamplingMode) -> Draw:
        """As `Sampler`."""
        count, params = batch.num_entries, self._rows.params
        thresholds = None
        if mode is not SamplingMode.PLAIN:
            thresholds = gpu.filter_thresholds(logits, batch.rows, params, out=self._thresholds)[:count]
        out = gpu.SampledTokens(self._outbox.tokens[:count], self._outbox.ok[:count])
        gpu.sample(logits, batch.rows, batch.seq_lens, params, thresholds, out=out, scratch=self._scratch)
        return Draw(out.tokens, out.ok)

    def draw_full(self, logits: torch.Tensor, batch: InputBatch, layout: StepLayout) -> Draw:
        """As `Sampler`."""
        return self.draw(logits.float(), batch, SamplingMode.FULL)
