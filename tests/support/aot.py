"""Compiles kernels ahead of time, without a GPU, and reports what they take.

The tests interpret the kernels, which a process decides when it first imports them; so compilation has a process of its
own: `python -m support.aot OP SM` prints a JSON line per case of `support/aot_cases/OP.py`.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
MAX_SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory that one program may take, by architecture."""


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel as a launcher would ask for it.

    signature: Triton types of the arguments that are not constexpr, such as `{"x": "*bf16", "n": "i32"}`, in order.
    constexprs: values of the others. aligned: names of arguments that are multiples of 16 (pointers are by default).
    archs: architectures that the specialisation is meant for.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    archs: tuple[int, ...] = (80, 90, 100)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AotReport:
    """registers: per thread. local_bytes: stack and spills per thread. shared_bytes: per program."""

    name: str
    arch: int
    registers: int
    local_bytes: int
    shared_bytes: int


def compile_case(case: AotCase, arch: int) -> AotReport:
    """Compile down to machine code. Raises what Triton or ptxas raise."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = {name for name, kind in case.signature.items() if kind.startswith("*")} | set(case.aligned)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    source_type = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = source_type(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, local = _resources(compiled.asm["cubin"])
    return AotReport(case.name, arch, registers, local, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert usage is not None, text
    return int(usage[1]), int(usage[2]) + int(usage[3])


def reports(op: str, arch: int) -> list[AotReport]:
    """Compile all cases of an op in a process of its own. Raises `AssertionError` with the compiler's words."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-m", "support.aot", op, str(arch)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [AotReport(**json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    op, arch = sys.argv[1], int(sys.argv[2])
    for case in importlib.import_module(f"support.aot_cases.{op}").cases():
        if arch in case.archs:
            print(json.dumps(asdict(compile_case(case, arch))), flush=True)


if __name__ == "__main__":
    main()
