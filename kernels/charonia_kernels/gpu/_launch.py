"""What launchers know about the device, and programmatic dependent launch (PDL).

With PDL (CUDA programming guide, "Programmatic Dependent Launch") a kernel may start while the one before it in the
stream still runs. Three rules keep that sound, and every kernel of this package follows them:

* Before `gdc_wait` a kernel writes nothing, and reads only what no kernel of a step writes: weights, rotary tables,
  constants; and what was complete before the step's fence (below).
* Some program of every launch calls `gdc_wait` before it ends, so that "the kernel before me is complete" holds along
  the whole chain; so does each program that reads what a kernel in front has written, or writes at all.
* What a kernel reads before its wait though a kernel has written it comes from the L2 cache (`.cg`, or a bulk copy).

`gdc_launch_dependents` only lets the next kernel start early; it promises nothing about memory.

A *fence* is a kernel all of whose programs call `gdc_wait` before `gdc_launch_dependents`. Whatever starts after it
starts when all before it is complete, and so may read that without a wait of its own, at once and in all kernels to
come. A step has one: the gather of the embeddings (`embedding.py`), which comes after the kernels that prepare the step
(rows, positions, slots, block tables, the plan of attention) and before all layers. Past it, those and the keys of
earlier steps may be read early; keys and values of this step may not.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when this was imported."""


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """What launch heuristics depend on.

    capability: (major, minor), such as (9, 0). num_sms: streaming multiprocessors. max_shared_bytes: shared memory that
    one program may take.
    """

    capability: tuple[int, int]
    num_sms: int
    max_shared_bytes: int

    @property
    def has_pdl(self) -> bool:
        """Whether kernels may be launched as programmatic dependents."""
        return self.capability >= (9, 0) and not INTERPRETED


H100 = DeviceTraits((9, 0), 132, 232_448)
"""Stands in for a device in the interpreter."""


@cache
def traits(device: torch.device) -> DeviceTraits:
    """Traits of a CUDA device; those of an H100 for the CPU, where kernels are only ever interpreted."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    return DeviceTraits(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"],
    )


@triton.jit
def gdc_wait(USE_PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until the kernel before this one has ended and its writes can be seen."""
    if USE_PDL:
        tl_cuda.gdc_wait()


@triton.jit
def gdc_launch_dependents(USE_PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start as soon as there is room for it."""
    if USE_PDL:
        tl_cuda.gdc_launch_dependents()
