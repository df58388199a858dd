"""Compiles grammars beside the step loop, once for all sequences that follow them."""

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import msgspec
from llguidance import LLMatcher, LLTokenizer

from charonia.errors import CharoniaError, EngineDeadError, InvalidRequestError, UnsupportedError
from charonia.request import Matcher
from charonia.structured.grammar import parser_limits, uncompilable
from charonia.structured.matcher import MaskFiller, SequenceMatcher, num_mask_threads
from charonia.structured.origins import Origins
from charonia.structured.sandbox import Sandbox, Setup
from charonia.structured_params import StructuredOutputsParams
from charonia.text.tokenizer_files import read_tokenizer_files

logger = logging.getLogger("charonia.engine")

MAX_CACHED_GRAMMARS = 128
"""Grammars kept compiled, or remembered as faulty."""


class GrammarCompiler:
    """A `charonia.core.constraints.GrammarBackend` of llguidance. One thread compiles; all else is the caller's.

    tokenizer_dir: of the model's tokenizer. vocab_size: of the model's logits; ids that the tokenizer does not have are
    never allowed. eos_token_ids: the model's own, to which the tokenizer's are added. python: the interpreter that
    tries grammars out.
    """

    def __init__(
        self, tokenizer_dir: str | Path, *, vocab_size: int, eos_token_ids: Collection[int], python: str
    ) -> None:
        self._tokenizer_dir = tokenizer_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._python = python
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="charonia-grammar")
        self._compiled: OrderedDict[bytes, _Compilation] = OrderedDict()
        self._sandbox: Sandbox | None = None
        self._filler: MaskFiller | None = None
        # Building the tokenizer holds the interpreter's lock: at the start that delays no step.
        self._tokenizer = self._thread.submit(self._build_tokenizer)

    def compile(self, params: StructuredOutputsParams) -> "Future[Matcher]":
        """Begin to compile, or take what has been compiled before."""
        key = msgspec.json.encode(params)
        compilation = self._compiled.get(key)
        if compilation is None or compilation.worth_another_try:
            compilation = self._compiled[key] = _Compilation(key)
            compilation.result = self._thread.submit(self._compile, compilation)
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return compilation.join(self._thread)

    def fill_masks(
        self, matchers: Sequence[Matcher], suppressed: Sequence[Collection[int]]
    ) -> tuple[memoryview, int]:
        """As `GrammarBackend`."""
        assert self._filler is not None, "whoever has a matcher has had the tokenizer"
        masks = self._filler.fill(cast(Sequence[SequenceMatcher], matchers), suppressed)
        return masks.data.cast("B"), self._filler.words_per_row

    def shutdown(self) -> None:
        """Stop compiling."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._sandbox is not None:
            self._sandbox.kill()
        self._thread.shutdown(wait=True)
        if self._sandbox is not None:
            self._sandbox.close()

    # ---- in the thread ----

    def _build_tokenizer(self) -> LLTokenizer:
        """Raises `UnsupportedError` for a tokenizer that llguidance cannot use."""
        try:
            files = read_tokenizer_files(self._tokenizer_dir)
            backend = files.backend
            added = max(backend.get_added_tokens_decoder(), default=-1) + 1
            size = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True), added)
            eos = sorted(files.eos_token_ids.union(self._eos_token_ids))
            setup = Setup(backend.to_str(), size, [token for token in eos if token < self._vocab_size])
            tokenizer = setup.build()
        except Exception as error:  # of several libraries
            logger.info("structured outputs are not available for this tokenizer: %s", error)
            raise UnsupportedError(
                "structured outputs are not available for this model's tokenizer"
            ) from None
        self._sandbox = Sandbox(self._python, setup)
        self._filler = MaskFiller(-(-size // 32))
        return tokenizer

    def _compile(self, compilation: "_Compilation") -> Origins:
        tokenizer = self._tokenizer.result()
        assert self._sandbox is not None, "built with the tokenizer"
        grammar = self._sandbox.try_out(compilation.params)

        def compile_grammar() -> LLMatcher:
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
            if matcher.is_error():
                raise uncompilable(matcher.get_error())
            return matcher

        return Origins(compile_grammar, frozenset(tokenizer.eos_tokens), num_mask_threads())


class _Compilation:
    """One grammar, and the sequences that wait for it. For the thread that calls `GrammarCompiler.compile`.

    What all have left before its turn came is not compiled, and keeps no memory until then.
    """

    result: Future[Origins]

    def __init__(self, params: bytes) -> None:
        """params: JSON of `StructuredOutputsParams`."""
        self.params = params
        self._num_waiting = 0

    @property
    def worth_another_try(self) -> bool:
        """Whether it was abandoned, or failed for a reason that may have gone."""
        result = self.result
        return result.cancelled() or (result.done() and isinstance(result.exception(), EngineDeadError))

    def join(self, thread: ThreadPoolExecutor) -> "Future[Matcher]":
        """For one more sequence, which leaves by cancelling it. thread: which compiles."""
        matcher: Future[Matcher] = Future()
        self._num_waiting += 1
        matcher.add_done_callback(self._note_left)
        if self._is_crowded:
            thread.submit(_hand_on, self.result, matcher)
        else:
            self.result.add_done_callback(lambda done: _hand_on(done, matcher))
        return matcher

    @property
    def _is_crowded(self) -> bool:
        result = self.result
        return (
            result.done() and not result.cancelled() and not result.exception() and result.result().is_crowded
        )

    def _note_left(self, matcher: "Future[Matcher]") -> None:
        if matcher.cancelled():
            self._num_waiting -= 1
            if self._num_waiting == 0 and self.result.cancel():
                self.params = b""


def _hand_on(origins: "Future[Origins]", matcher: "Future[Matcher]") -> None:
    """A matcher of its own for one sequence, or the error."""
    if not matcher.set_running_or_notify_cancel():
        return
    try:
        matcher.set_result(origins.result().branch())
    except CharoniaError as error:
        matcher.set_exception(error)
    except CancelledError:
        matcher.set_exception(EngineDeadError("the engine is shutting down"))
    except BaseException:
        # A panic of native code is no Exception, and would end the thread.
        logger.exception("a grammar could not be compiled")
        matcher.set_exception(
            InvalidRequestError("sampling parameter 'structured_outputs' cannot be compiled")
        )
