"""Stretches of constraints never overlap, survive growth, and are used again."""

import random

import torch
from charonia.worker.rule_pool import RulePool

CPU = torch.device("cpu")


def stored(pool: RulePool, offset: int, length: int) -> list[int]:
    return pool.words[offset : offset + length].tolist()


def test_words_lie_one_behind_the_other() -> None:
    pool = RulePool(16, CPU)
    assert pool.place(0, [1, 2, 3]) == 0
    assert pool.place(5, [4, 5]) == 3
    assert stored(pool, 0, 6) == [1, 2, 3, 4, 5, 0]


def test_the_first_gap_that_is_large_enough_is_used_again() -> None:
    pool = RulePool(16, CPU)
    offsets = [pool.place(row, [row + 1] * length) for row, length in enumerate((2, 3, 4, 2))]
    assert offsets == [0, 2, 5, 9]
    pool.free(0)
    pool.free(2)
    assert pool.place(4, [9, 9, 9]) == 5, "a gap of two is too small for three"
    assert pool.place(5, [8]) == 0
    assert pool.place(6, [7]) == 1
    assert pool.place(7, [6, 6]) == 11, "one word is left of the gap"
    assert stored(pool, 0, 13) == [8, 7, 2, 2, 2, 9, 9, 9, 3, 4, 4, 6, 6]


def test_growth_keeps_words_and_offsets() -> None:
    pool = RulePool(4, CPU)
    assert pool.place(0, [1, 2, 3, 4]) == 0
    before = pool.words
    assert pool.place(1, [5]) == 4
    assert pool.words is not before
    assert pool.place(2, list(range(100))) == 5
    assert stored(pool, 0, 5) == [1, 2, 3, 4, 5]
    assert stored(pool, 5, 100) == list(range(100))


def test_a_row_without_words_can_be_freed() -> None:
    pool = RulePool(4, CPU)
    pool.place(0, [1])
    pool.free(3)
    assert stored(pool, 0, 1) == [1]
    assert pool.place(1, [2]) == 1


def test_rows_come_and_go() -> None:
    rng = random.Random(0)
    pool = RulePool(8, CPU)
    placed: dict[int, tuple[int, list[int]]] = {}
    for _ in range(400):
        row = rng.randrange(12)
        if row in placed:
            pool.free(row)
            del placed[row]
        else:
            words = [rng.randrange(1, 1 << 30) for _ in range(rng.randrange(1, 20))]
            placed[row] = (pool.place(row, words), words)
        for offset, words in placed.values():
            assert stored(pool, offset, len(words)) == words
    assert len(pool.words) <= 1024, "stretches are used again"
