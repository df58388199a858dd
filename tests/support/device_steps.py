"""Steps of devices that compute nothing: what the engine core gets back when it launches one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from charonia.core.step import StepPlan, StepResult, TokenMasks


@dataclass
class Pending:
    """A launched step. read: its result has been asked for."""

    result: StepResult
    read: bool = False

    def wait(self) -> StepResult:
        self.read = True
        return self.result


class Device(Protocol):
    """What draws the rest of a step. steps: those launched before."""

    @property
    def steps(self) -> Sequence[Pending]: ...

    def finish(self, plan: StepPlan, masks: TokenMasks | None) -> Pending: ...


@dataclass
class Undrawn:
    """A step that waits for its masks."""

    device: Device
    plan: StepPlan

    def draw(self, masks: TokenMasks) -> Pending:
        assert all(step.read for step in self.device.steps), (
            "masks follow from the results of all steps before"
        )
        return self.device.finish(self.plan, masks)
