"""How many threads the kernels use: a setting of their own, apart from PyTorch's."""

import torch

_limit: int | None = None


def num_threads() -> int:
    """Most threads that a launch uses; PyTorch's number until `set_num_threads` was called."""
    return torch.get_num_threads() if _limit is None else _limit


def set_num_threads(count: int) -> None:
    """Set the most threads that a launch uses, in the whole process. `count` is at least 1.

    Where the kernels do the large products, give PyTorch one thread: its OpenMP threads spin between operators, on the
    very cores that the kernels' helpers need.
    """
    if count < 1:
        raise ValueError(f"the number of threads must be at least 1, got {count}")
    global _limit
    _limit = count
