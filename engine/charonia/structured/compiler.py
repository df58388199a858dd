"""Compiles grammars beside the step loop, once for all sequences that follow them."""

import logging
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from os import sched_getaffinity
from pathlib import Path
from typing import cast

import msgspec
from llguidance import LLMatcher, LLTokenizer

from charonia.errors import CharoniaError, EngineDeadError, InvalidRequestError, UnsupportedError
from charonia.request import Matcher
from charonia.structured.grammar import compiled_bytes, parser_limits, uncompilable
from charonia.structured.grammar_cache import GrammarCache
from charonia.structured.matcher import MaskFiller, SequenceMatcher, num_mask_threads
from charonia.structured.origins import Origins
from charonia.structured.sandbox import Setup
from charonia.structured.sandboxes import Sandboxes
from charonia.structured_params import StructuredOutputsParams
from charonia.text.tokenizer_files import read_tokenizer_files

logger = logging.getLogger("charonia.engine")

_here = threading.local()
"""Has `compiles` in threads that compile."""


def num_compile_threads() -> int:
    """Grammars that are compiled at once: two even on a single core, so that a slow one never has all threads."""
    return max(2, min(4, len(sched_getaffinity(0)) // 2))


class GrammarCompiler:
    """A `charonia.core.constraints.GrammarBackend` of llguidance. A few threads compile; all else is the caller's.

    tokenizer_dir: of the model's tokenizer. vocab_size: of the model's logits; ids that the tokenizer does not have are
    never allowed. eos_token_ids: the model's own, to which the tokenizer's are added. python: the interpreter that
    tries grammars out. num_threads: that compile, each with a sandbox; none is started before it is needed.
    """

    def __init__(
        self,
        tokenizer_dir: str | Path,
        *,
        vocab_size: int,
        eos_token_ids: Collection[int],
        python: str,
        num_threads: int,
    ) -> None:
        self._tokenizer_dir = tokenizer_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._python = python
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(
            num_threads, thread_name_prefix="charonia-grammar", initializer=_note_compiling
        )
        """The calling thread compiles nothing, so that it never waits."""
        self._compiled: GrammarCache[_Compilation] = GrammarCache()
        """Grammars compiled, being compiled, or remembered as faulty."""
        self._sandboxes: Sandboxes | None = None
        self._filler: MaskFiller | None = None
        # Building the tokenizer holds the interpreter's lock: at the start that delays no step.
        self._tokenizer = self._threads.submit(self._build_tokenizer)

    def compile(self, params: StructuredOutputsParams) -> "Future[Matcher]":
        """Begin to compile, or take what has been compiled before."""
        key = msgspec.json.encode(params)
        compilation = self._compiled.get(key)
        if compilation is None or compilation.worth_another_try:
            compilation = _Compilation(key)
            compilation.result = self._threads.submit(self._compile, compilation)
            self._compiled.put(key, compilation)
        return compilation.join(self._threads)

    def fill_masks(
        self, matchers: Sequence[Matcher], suppressed: Sequence[Collection[int]]
    ) -> tuple[memoryview, int]:
        """As `GrammarBackend`."""
        assert self._filler is not None, "whoever has a matcher has had the tokenizer"
        masks = self._filler.fill(cast(Sequence[SequenceMatcher], matchers), suppressed)
        return masks.data.cast("B"), self._filler.words_per_row

    def shutdown(self) -> None:
        """Stop compiling."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._sandboxes is not None:
            self._sandboxes.kill()
        self._threads.shutdown(wait=True)
        if self._sandboxes is not None:
            self._sandboxes.close()

    # ---- in the threads ----

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
        self._sandboxes = Sandboxes(self._python, setup, self._num_threads)
        self._filler = MaskFiller(-(-size // 32))
        return tokenizer

    def _compile(self, compilation: "_Compilation") -> Origins:
        tokenizer = self._tokenizer.result()
        assert self._sandboxes is not None, "built with the tokenizer"
        grammar = self._sandboxes.try_out(compilation.params)

        def compile_grammar() -> LLMatcher:
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
            if matcher.is_error():
                raise uncompilable(matcher.get_error())
            return matcher

        return Origins(
            compile_grammar,
            _may_compile,
            frozenset(tokenizer.eos_tokens),
            max_origins=num_mask_threads(),
            bytes_each=compiled_bytes(grammar),
        )


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
    def num_bytes(self) -> int:
        """An estimate of its memory."""
        compiled = self._compiled
        return len(self.params) + (0 if compiled is None else compiled.num_bytes)

    @property
    def worth_another_try(self) -> bool:
        """Whether it was abandoned, or failed for a reason that may have gone."""
        result = self.result
        return result.cancelled() or (result.done() and isinstance(result.exception(), EngineDeadError))

    def join(self, threads: ThreadPoolExecutor) -> "Future[Matcher]":
        """For one more sequence, which leaves by cancelling it. threads: which compile."""
        matcher: Future[Matcher] = Future()
        self._num_waiting += 1
        matcher.add_done_callback(self._note_left)
        if self._compiled is not None and self._compiled.is_crowded:
            threads.submit(_hand_on, self.result, matcher)
        else:
            self.result.add_done_callback(lambda done: _hand_on(done, matcher))
        return matcher

    @property
    def _compiled(self) -> Origins | None:
        result = self.result
        if not result.done() or result.cancelled() or result.exception():
            return None
        return result.result()

    def _note_left(self, matcher: "Future[Matcher]") -> None:
        if matcher.cancelled():
            self._num_waiting -= 1
            if self._num_waiting == 0 and self.result.cancel():
                self.params = b""


def _note_compiling() -> None:
    _here.compiles = True


def _may_compile() -> bool:
    return getattr(_here, "compiles", False)


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
