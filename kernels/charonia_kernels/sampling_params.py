"""The sampling parameters of a row as they lie on the device: 16 int32 words, floats by their bits.

Pure Python, so that whoever stages rows can lay them out without a tensor library.
"""

import math
import struct

TEMPERATURE = 0
"""fp32 bits; 0 is greedy."""
INVERSE_TEMPERATURE = 1
"""fp32 bits of 1 / temperature, 1 for greedy rows. Kernels multiply by it, so all get the same scaled logits."""
TOP_P = 2
"""fp32 bits; 1 keeps all tokens."""
MIN_P = 3
"""fp32 bits; 0 keeps all tokens."""
TOP_K = 4
"""0 keeps all tokens, as does anything from the size of the vocabulary on."""
SEED_LO = 5
SEED_HI = 6
REPETITION = 7
"""fp32 bits; 1 is none."""
FREQUENCY = 8
"""fp32 bits; 0 is none."""
PRESENCE = 9
"""fp32 bits; 0 is none."""
NUM_PROMPT = 10
"""Length of the prompt; tokens from this position on are output."""
MIN_TOKENS = 11
"""Stop ids are excluded while the output is shorter."""
LOG_MIN_P = 12
"""fp32 bits of the logarithm of min_p: that far below the largest scaled logit tokens are kept."""
NUM_PARAMS = 16
"""Words of a row; the rest is 0."""

MIN_TEMPERATURE = 1e-5
"""Below, a row is greedy."""


def float_bits(value: float) -> int:
    """The int32 with the bits of `value` as fp32."""
    return int.from_bytes(struct.pack("<f", value), "little", signed=True)


def int32(value: int) -> int:
    """The int32 with the low 32 bits of `value`."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def pack(
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    num_prompt: int = 0,
    min_tokens: int = 0,
) -> list[int]:
    """The words of a row, each in the range of an int32.

    seed: its low 64 bits count. temperature: less than `MIN_TEMPERATURE` is greedy, and then no filter applies.
    """
    greedy = temperature < MIN_TEMPERATURE
    words = [0] * NUM_PARAMS
    words[TEMPERATURE] = 0 if greedy else float_bits(temperature)
    words[INVERSE_TEMPERATURE] = float_bits(1.0 if greedy else 1.0 / temperature)
    words[TOP_P] = float_bits(top_p)
    words[MIN_P] = float_bits(min_p)
    words[TOP_K] = min(max(top_k, 0), 0x7FFFFFFF)
    words[SEED_LO], words[SEED_HI] = int32(seed), int32(seed >> 32)
    words[REPETITION] = float_bits(repetition)
    words[FREQUENCY] = float_bits(frequency)
    words[PRESENCE] = float_bits(presence)
    words[NUM_PROMPT] = num_prompt
    words[MIN_TOKENS] = min(min_tokens, 0x7FFFFFFF)
    words[LOG_MIN_P] = float_bits(math.log(min_p) if min_p > 0 else -math.inf)
    return words
