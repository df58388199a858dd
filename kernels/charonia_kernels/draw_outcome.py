"""What became of a draw. Pure Python, so that whoever reads results needs no tensor library."""

from enum import IntEnum


class DrawOutcome(IntEnum):
    """As the samplers report it for each entry of a batch; the token means something only where it is `DRAWN`."""

    DRAWN = 0
    NOT_FINITE = 1
    """A logit is NaN or +inf."""
    EXCLUDED = 2
    """Every logit is -inf: rules and masks have left no token."""
