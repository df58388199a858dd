"""Random prompts, and flags that size them."""

import argparse
import random
from pathlib import Path

from charonia.model_config import ModelConfig
from charonia.sampling_params import SamplingParams


def positive_int(text: str) -> int:
    """A command line's positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def add_length_flags(parser: "argparse._ActionsContainer", *, input_len: int, output_len: int) -> None:
    """Declare `--input-len` and `--output-len`."""
    parser.add_argument(
        "--input-len", type=positive_int, default=input_len, metavar="N", help="(default %(default)s)"
    )
    parser.add_argument(
        "--output-len", type=positive_int, default=output_len, metavar="N", help="(default %(default)s)"
    )


def vocab_size(model: str | Path) -> int:
    """How many token ids the model knows."""
    return ModelConfig.from_dir(model).vocab_size


def random_prompts(rng: random.Random, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts that share nothing."""
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def exactly(num_tokens: int) -> SamplingParams:
    """Greedy, to the length, and no text."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
