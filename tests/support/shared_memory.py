"""Where Triton places a program's buffers in shared memory."""

import math
import re
import tempfile
from dataclasses import dataclass
from itertools import product

_OFFSET = re.compile(r"allocation\.offset = (\d+)")
_BUFFER = re.compile(r"ttg\.local_alloc.*memdesc<([0-9x]+)x([a-zA-Z0-9]+),")
PTX_VERSION = 87
_BYTES = {"i64": 8, "i32": 4, "f32": 4, "bf16": 2, "f16": 2, "i8": 1, "f8E4M3FN": 1}


@dataclass(frozen=True)
class Buffer:
    """Shared memory from `offset` on. num_bytes: 1 for what an operation keeps there, of which the size is not told."""

    offset: int
    num_bytes: int
    is_barrier: bool
    line: str

    def overlaps(self, other: "Buffer") -> bool:
        """Whether they have a byte in common."""
        return self.offset < other.offset + other.num_bytes and other.offset < self.offset + self.num_bytes


def buffers(ttgir: str, arch: int) -> list[Buffer]:
    """All that the compiler places in the shared memory of a kernel."""
    found = []
    for line in placed_module(ttgir, arch).splitlines():
        offset = _OFFSET.search(line)
        if offset is None:
            continue
        size, is_barrier = 1, False
        buffer = _BUFFER.search(line)
        if buffer is not None:
            size = math.prod(map(int, buffer[1].split("x"))) * _BYTES[buffer[2]]
            is_barrier = buffer[2] == "i64"
        found.append(Buffer(int(offset[1]), size, is_barrier, line.strip()))
    return found


def shared_barriers(found: list[Buffer]) -> list[str]:
    """What else lies where a barrier does."""
    return [
        f"{one.line[:60]} and {other.line[:60]} at {one.offset}"
        for one, other in product(found, found)
        if one is not other and one.is_barrier and one.overlaps(other)
    ]


def placed_module(ttgir: str, arch: int) -> str:
    """A compiled kernel's Triton GPU IR after the compiler's pass that places the buffers, and those in front of it."""
    from triton._C.libtriton import ir, nvidia, passes

    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, arch, PTX_VERSION)
    manager.run(module, "placed_module")
    return str(module)
