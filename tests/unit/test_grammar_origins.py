"""How sequences of one grammar are spread over matchers whose locks they share."""

import threading
from typing import Any

from charonia.structured.origins import MAX_PER_ORIGIN, Origins


class Native:
    """Stands in for llguidance's matcher: knows what it was copied from."""

    def __init__(self, origin: "Native | None" = None) -> None:
        self.copied_from = origin

    def deep_copy(self) -> "Native":
        return Native(self)


def make(max_origins: int) -> tuple[Origins, list[Native]]:
    made: list[Native] = []

    def compile_grammar() -> Any:
        made.append(Native())
        return made[-1]

    thread = threading.get_ident()
    origins = Origins(
        compile_grammar,
        lambda: threading.get_ident() == thread,
        frozenset({2}),
        max_origins=max_origins,
        bytes_each=10,
    )
    return origins, made


def test_few_sequences_share_an_origin_and_many_are_spread() -> None:
    origins, made = make(max_origins=3)
    matchers = [origins.branch() for _ in range(6 * MAX_PER_ORIGIN)]
    counts = [sum(matcher.native.copied_from is native for matcher in matchers) for native in made]
    assert counts == [2 * MAX_PER_ORIGIN] * 3
    assert all(matcher.native.copied_from is made[matcher.origin] for matcher in matchers)
    assert matchers[0].end_token_ids == {2} and origins.num_bytes == 30


def test_sequences_that_have_gone_make_room() -> None:
    origins, made = make(max_origins=8)
    for _ in range(5 * MAX_PER_ORIGIN):
        origins.branch()
    assert len(made) == 1 and not origins.is_crowded


def test_only_the_compiling_thread_compiles() -> None:
    origins, made = make(max_origins=8)
    matchers = [origins.branch() for _ in range(MAX_PER_ORIGIN)]
    assert origins.is_crowded
    other = threading.Thread(target=lambda: matchers.append(origins.branch()))
    other.start()
    other.join()
    assert len(made) == 1 and len(matchers) == MAX_PER_ORIGIN + 1
    matchers.append(origins.branch())
    assert len(made) == 2
