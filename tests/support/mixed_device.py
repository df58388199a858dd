"""A device made up for the scheduler: it does for requests of every kind what a runner does, and checks every plan.

What a request brings follows from its tokens and its seed alone, so an oracle can tell it beforehand. Keys and values
are the tokens that they were computed from: a block that is used while another's content is in it shows.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from charonia.config import SchedulerConfig
from charonia.core.step import NewRow, ScheduledRequest, StepPlan, StepResult, TokenMasks
from charonia.errors import InvalidRequestError
from charonia.outputs import TokenLogprobs
from charonia.request import EngineRequest, Matcher
from charonia.structured_params import StructuredOutputsParams
from support.device_steps import Pending, Undrawn

VOCAB = 32
EOS = 7


def drawn(tokens: Sequence[int], seed: int, allowed: Collection[int] = range(VOCAB)) -> int:
    """The token that follows."""
    return sorted(allowed)[hash((seed, *tokens)) % len(allowed)]


def fails(seed: int, num_output: int) -> bool:
    """Whether the logits behind so many tokens of output are not finite."""
    return seed % 13 == 3 and num_output == 2


def runs_out(seed: int, bad_words: object, num_output: int) -> bool:
    """Whether every token is excluded behind so many tokens of output."""
    return bool(bad_words) and num_output == seed % 5


class WordMatcher:
    """A grammar of `word`: so many tokens that depend on those before, or earlier the end token."""

    end_token_ids = frozenset({EOS})

    def __init__(self, word: str) -> None:
        self.history: list[int] = []
        self.complete = False
        self.error: str | None = None
        self._length = 2 + len(word)
        self._fails_after = 3 if "x" in word else None

    def accept(self, token_id: int) -> None:
        assert not self.complete, "nothing follows the end"
        assert token_id in self.allowed(), "only what was allowed may come"
        self.history.append(token_id)
        self.complete = len(self.history) == self._length or token_id == EOS

    def allowed(self) -> set[int]:
        first = 8 + hash(tuple(self.history)) % 20
        return {first, first + 1, first + 2} | ({EOS} if len(self.history) > 1 else set())

    def mask(self, without: Collection[int]) -> set[int]:
        """What may come; it fails where the grammar can be followed no further."""
        if len(self.history) == self._fails_after:
            self.error = "too complex"
        return self.allowed() - set(without) or self.allowed()

    def rollback(self, num_tokens: int) -> None:
        raise AssertionError("nothing is taken back")


@dataclass
class WordGrammars:
    """A grammar backend whose grammars are `regex` words; those with a "!" do not compile. It compiles when told to."""

    waiting: "list[tuple[str, Future[Matcher]]]" = field(default_factory=list)

    def compile(self, params: StructuredOutputsParams) -> "Future[Matcher]":
        assert params.regex is not None
        future: Future[Matcher] = Future()
        self.waiting.append((params.regex, future))
        return future

    def release(self) -> None:
        for word, future in self.waiting:
            if not future.set_running_or_notify_cancel():
                continue
            if "!" in word:
                future.set_exception(InvalidRequestError("no such grammar"))
            else:
                future.set_result(WordMatcher(word))
        self.waiting.clear()

    def fill_masks(
        self, matchers: Sequence[Matcher], suppressed: Sequence[Collection[int]]
    ) -> tuple[memoryview, int]:
        words = bytearray()
        for matcher, without in zip(matchers, suppressed, strict=True):
            assert isinstance(matcher, WordMatcher)
            words += sum(1 << token for token in matcher.mask(without)).to_bytes(4, "little")
        return memoryview(bytes(words)), 1

    def shutdown(self) -> None:
        self.waiting.clear()


@dataclass
class Row:
    """tokens: known to the device; computed: of them, those whose keys and values are in the blocks."""

    new: NewRow
    tokens: list[int]
    blocks: list[int]
    computed: int

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.new.num_prompt_tokens


@dataclass
class MixedDevice:
    config: SchedulerConfig
    rows: dict[int, Row] = field(default_factory=dict)
    slots: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    steps: list[Pending] = field(default_factory=list)
    undrawn: bool = False

    def launch(self, plan: StepPlan) -> Pending:
        assert not plan.constrained_rows
        self._begin(plan)
        return self.finish(plan, None)

    def launch_undrawn(self, plan: StepPlan) -> Undrawn:
        assert plan.constrained_rows
        self._begin(plan)
        self.undrawn = True
        return Undrawn(self, plan)

    def shutdown(self) -> None:
        pass

    def _begin(self, plan: StepPlan) -> None:
        assert not self.undrawn, "a step is drawn before the next is launched"
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        for row_id in plan.freed_rows:
            del self.rows[row_id]
        for new in plan.new_rows:
            assert new.row not in self.rows, "a row has one owner"
            assert new.pooling is None or new.pooling.pooling_type == "last" or not new.num_computed_tokens
            self.rows[new.row] = Row(new, list(new.token_ids), list(new.block_ids), new.num_computed_tokens)
        for delta in plan.block_deltas:
            self.rows[delta.row].blocks.extend(delta.block_ids)
        assert len({item.row for item in plan.scheduled}) == len(plan.scheduled)
        # All writes of a layer come before its reads.
        for item in plan.scheduled:
            self._write(self.rows[item.row], item.num_tokens)
        for item in plan.scheduled:
            self._check_readable(self.rows[item.row])

    def _write(self, row: Row, num_tokens: int) -> None:
        size = self.config.block_size
        for position in range(row.computed, row.computed + num_tokens):
            self.slots[row.blocks[position // size], position % size] = tuple(row.tokens[: position + 1])
        row.computed += num_tokens

    def _check_readable(self, row: Row) -> None:
        size = self.config.block_size
        for position in range(row.computed):
            held = self.slots[row.blocks[position // size], position % size]
            assert held == tuple(row.tokens[: position + 1]), "a block was overwritten while in use"

    def finish(self, plan: StepPlan, masks: TokenMasks | None) -> Pending:
        """Draw, and embed what has been computed to its end."""
        self.undrawn = False
        allowed = {} if masks is None else _allowed(masks)
        assert set(allowed) <= set(plan.constrained_rows)
        result = StepResult(plan.step_id, [], {}, {}, [], None, {}, [])
        for item in plan.scheduled:
            row = self.rows[item.row]
            if row.new.pooling is not None:
                if row.computed == row.new.num_prompt_tokens:
                    result.embeddings[item.row] = embedding(row.tokens)
                continue
            if row.new.sampling.prompt_logprobs is not None:
                self._score(row, item, result)
            if item.samples:
                assert row.computed == len(row.tokens)
                self._sample(row, item.row, allowed.get(item.row, range(VOCAB)), result)
        self.steps = [step for step in self.steps if not step.read]
        self.steps.append(Pending(result))
        return self.steps[-1]

    def _score(self, row: Row, item: ScheduledRequest, result: StepResult) -> None:
        first = row.computed - item.num_tokens + 1
        scored = row.tokens[first : min(row.computed + 1, row.new.num_prompt_tokens)]
        if scored:
            result.prompt_logprobs[item.row] = [TokenLogprobs([token], [0.0], 1) for token in scored]

    def _sample(self, row: Row, row_id: int, allowed: Collection[int], result: StepResult) -> None:
        new, num_output = row.new, row.num_output
        if fails(new.seed, num_output):
            result.failed_rows.append(row_id)
        elif runs_out(new.seed, new.bad_words, num_output):
            result.excluded_rows.append(row_id)
        token = drawn(row.tokens, new.seed, allowed)
        row.tokens.append(token)
        result.token_ids.append(token)


def _allowed(masks: TokenMasks) -> dict[int, set[int]]:
    words = [int.from_bytes(masks.words[4 * i : 4 * i + 4], "little") for i in range(len(masks.rows))]
    return {
        row: {token for token in range(VOCAB) if word >> token & 1}
        for row, word in zip(masks.rows, words, strict=True)
    }


def embedding(tokens: Sequence[int]) -> bytes:
    """Of a prompt."""
    return bytes(tokens)


@dataclass(frozen=True)
class Outcome:
    """What a request brings if nobody cancels it; reason: of `FinishReason`. blame: the code of its error."""

    tokens: list[int]
    reason: str
    blame: str | None = None


def outcome_of(data: EngineRequest) -> Outcome:
    """By the rules, one token after the other."""
    tokens, out = list(data.prompt_token_ids), list[int]()
    form = data.sampling.structured_outputs
    if data.pooling is not None:
        return Outcome([], "stop")
    if form is not None and "!" in (form.regex or ""):
        return Outcome([], "error", "INVALID_ARG")
    matcher = None if form is None else WordMatcher(form.regex or "")
    while len(out) < data.max_tokens:
        allowed: Collection[int] = range(VOCAB)
        if matcher is not None:
            early = len(out) < data.sampling.min_tokens
            allowed = matcher.mask({*data.stop_token_ids, EOS} if early else ())
            if matcher.error:
                return Outcome(out, "error", "INVALID_ARG")
        if fails(data.seed, len(out)):
            return Outcome(out, "error", "INTERNAL")
        if runs_out(data.seed, data.bad_words, len(out)):
            return Outcome(out, "error", "INVALID_ARG")
        out.append(drawn(tokens, data.seed, allowed))
        tokens.append(out[-1])
        if out[-1] in data.stop_token_ids and len(out) >= data.sampling.min_tokens:
            return Outcome(out, "stop")
        if matcher is not None:
            matcher.accept(out[-1])
            if matcher.complete:
                return Outcome(out, "stop")
    return Outcome(out, "length")
