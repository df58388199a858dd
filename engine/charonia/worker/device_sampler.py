"""The GPU's sampler: kernels that read what rows ask for from the rows' own records."""

from dataclasses import dataclass

import torch
from charonia_kernels import gpu, logprobs
from charonia_kernels.logit_rule_layout import RECORD_WORDS, RuleSet, build_rules

from charonia.core.step import NewRow, StepPlan, TokenMasks
from charonia.worker.batch import InputBatch, StepLayout
from charonia.worker.logprobs import SampledLogprobs, scores_sent_to_host, sent_to_host
from charonia.worker.results import TokenOutbox
from charonia.worker.rows import RequestRows
from charonia.worker.rule_pool import RulePool
from charonia.worker.sampling import Draw
from charonia.worker.sampling_mode import SamplingMode, is_penalised
from charonia.worker.token_masks import MaskRecords

_POOL_WORDS = 1 << 20


@dataclass(frozen=True, slots=True)
class _PlacedRules:
    rules: RuleSet
    offset: int


class DeviceSampler:
    """Draws with `charonia_kernels`' sampling kernels, into the outbox. Nothing here waits for the device."""

    def __init__(
        self,
        rows: RequestRows,
        outbox: TokenOutbox,
        *,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._rows = rows
        self._outbox = outbox
        self._vocab_size = vocab_size
        self._scratch = gpu.SampleScratch.allocate(max_num_seqs, device)
        self._thresholds = torch.zeros(max_num_seqs, device=device)
        self._counts = gpu.allocate_counts(max_num_seqs, vocab_size, device)
        self._pool = RulePool(_POOL_WORDS, device)
        self._placed: dict[int, _PlacedRules] = {}
        self._penalised: set[int] = set()

    def apply(self, plan: StepPlan) -> None:
        """As `Sampler`."""
        for row in plan.freed_rows:
            self._penalised.discard(row)
            if self._placed.pop(row, None) is not None:
                self._pool.free(row)
        for new in plan.new_rows:
            self._enter(new)

    def mode(self) -> SamplingMode:
        """As `Sampler`."""
        return self._rows.most_demanding_mode

    def draw(self, logits: torch.Tensor, batch: InputBatch, mode: SamplingMode) -> Draw:
        """As `Sampler`."""
        count, params = batch.num_entries, self._rows.params
        thresholds = None
        if mode is not SamplingMode.PLAIN:
            thresholds = gpu.filter_thresholds(logits, batch.rows, params, out=self._thresholds)[:count]
        out = gpu.SampledTokens(self._outbox.tokens[:count], self._outbox.outcomes[:count])
        gpu.sample(logits, batch.rows, batch.seq_lens, params, thresholds, out=out, scratch=self._scratch)
        return Draw(out.tokens, out.outcomes)

    def draw_full(
        self, logits: torch.Tensor, batch: InputBatch, layout: StepLayout, masks: TokenMasks | None
    ) -> Draw:
        """As `Sampler`."""
        rows = self._rows
        changed = logits.float()
        if changed is logits:
            changed = logits.clone()
        state = (batch.rows, batch.seq_lens, rows.token_ids, rows.params)
        records = self._records(layout)
        if records is not None:
            gpu.apply_logit_rules(changed, *state, records, self._pool.words)
        sent = None
        if masks is not None:
            sent = MaskRecords.send(masks, layout.rows, self._vocab_size, rows.device)
        if sent is not None:
            gpu.apply_logit_rules(changed, *state, sent.records, sent.words)
        if not self._penalised.isdisjoint(layout.rows.tolist()):
            gpu.apply_penalties(changed, *state, self._counts)
        draw = self.draw(changed, batch, SamplingMode.FULL)
        return Draw(draw.tokens, draw.outcomes, self._logprobs(logits, draw.tokens, layout))

    def dry_run(self, logits: torch.Tensor, batch: InputBatch) -> None:
        """Launch every kernel that `draw_full` may launch, on rows that ask for nothing."""
        rows = self._rows
        state = (batch.rows, batch.seq_lens, rows.token_ids, rows.params)
        changed = logits.float()
        records = torch.zeros((1, RECORD_WORDS), dtype=torch.int32, device=rows.device)
        gpu.apply_logit_rules(changed, *state, records, self._pool.words)
        gpu.apply_penalties(changed, *state, self._counts)
        draw = self.draw(changed, batch, SamplingMode.FULL)
        logprobs(logits, draw.tokens, 1)

    def _enter(self, new: NewRow) -> None:
        sampling = new.sampling
        if is_penalised(sampling):
            self._penalised.add(new.row)
        rules = build_rules(
            self._vocab_size,
            bias=sampling.logit_bias,
            allowed=sampling.allowed_token_ids,
            bad_words=new.bad_words,
            stop_ids=new.stop_token_ids if sampling.min_tokens > 0 else (),
        )
        if rules.rules:
            self._placed[new.row] = _PlacedRules(rules, self._pool.place(new.row, rules.words))

    def _records(self, layout: StepLayout) -> torch.Tensor | None:
        """[M, RECORD_WORDS] int32: every rule of every entry; None when there are none."""
        if not self._placed:
            return None
        words: list[int] = []
        for entry, row in enumerate(layout.rows.tolist()):
            placed = self._placed.get(row)
            if placed is not None:
                words += placed.rules.records(entry, placed.offset)
        if not words:
            return None
        records = torch.tensor(words, dtype=torch.int32).view(-1, RECORD_WORDS).pin_memory()
        return records.to(self._rows.device, non_blocking=True)

    def _logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, layout: StepLayout
    ) -> SampledLogprobs | None:
        entries, rows, counts = [], [], []
        for entry, row in enumerate(layout.rows.tolist()):
            state = self._rows.find(row)
            if state is not None and layout.samples[entry] and state.sampling.logprobs is not None:
                entries.append(entry)
                rows.append(row)
                counts.append(state.sampling.logprobs)
        if not entries:
            return None
        index = torch.tensor(entries).pin_memory().to(logits.device, non_blocking=True)
        # A copy: the outbox belongs to the next step before anyone reads this.
        chosen = tokens[index]
        scores = scores_sent_to_host(logprobs(logits[index], chosen, max(counts)))
        return SampledLogprobs(rows, counts, sent_to_host(chosen), scores)
