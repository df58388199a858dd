"""Compiles kernels ahead of time, without a GPU, and reports what they take.

The tests interpret the kernels, which a process decides when it first imports them; so compilation has a process of its
own: `python -m support.aot OP:SM ...` prints a JSON line per case of `support/aot_cases/OP.py` for an architecture.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from support.shared_memory import buffers, shared_barriers

TESTS = Path(__file__).resolve().parent.parent
MAX_SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory that one program may take, by architecture."""
FULL_ARCH = 90
"""All cases are compiled for this architecture, for others the first of each kernel."""


BINDER_LOCALS = {"params", "specialization", "options", "backend"}
"""Names that Triton's launch binder uses itself: an argument of such a name is mistaken for it at the first launch."""


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
    """What a case takes, or the error that it ends in.

    kernel: its module and name. registers: per thread. local_bytes: stack and spills per thread. shared_bytes: per
    program. shared_barriers: what lies in the place of a barrier (of Gluon kernels).
    """

    op: str
    arch: int
    kernel: str
    name: str
    registers: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    shared_barriers: tuple[str, ...] = ()
    error: str = ""


def kernel_name(case: AotCase) -> str:
    """The module and the name of the kernel's function."""
    function = case.kernel.fn
    return f"{function.__module__}.{function.__name__}"


def op_names() -> list[str]:
    """The ops that have cases."""
    return sorted(path.stem for path in (TESTS / "support/aot_cases").glob("[!_]*.py"))


def all_cases(op: str) -> list[AotCase]:
    """The cases of an op, for any architecture."""
    return list(importlib.import_module(f"support.aot_cases.{op}").cases())


def cases_for(op: str, arch: int) -> list[AotCase]:
    """The cases of an op that are compiled for an architecture."""
    cases = [case for case in all_cases(op) if arch in case.archs]
    if arch == FULL_ARCH:
        return cases
    return list({kernel_name(case): case for case in reversed(cases)}.values())


def compile_case(case: AotCase, arch: int) -> tuple[int, int, int, tuple[str, ...]]:
    """Compile down to machine code: registers, local bytes, shared bytes, shared barriers.

    Raises what Triton or ptxas raise.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = case.kernel.arg_names
    assert not BINDER_LOCALS & set(names), f"{case.name}: rename {BINDER_LOCALS & set(names)}"
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = {name for name, kind in case.signature.items() if kind.startswith("*")} | set(case.aligned)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    source_type = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = source_type(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    shared: tuple[str, ...] = ()
    if case.kernel.is_gluon():
        found = buffers(compiled.asm["ttgir"], arch)
        assert any(buffer.is_barrier for buffer in found), "no barrier found"
        shared = tuple(shared_barriers(found))
    registers, local = _resources(compiled.asm["cubin"])
    return registers, local, compiled.metadata.shared, shared


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


def reports(pairs: Collection[tuple[str, int]]) -> list[AotReport]:
    """Compile the cases of pairs of an op and an architecture, in processes of their own, as many as there are CPUs."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (env.get("PYTHONPATH"), str(TESTS))))
    names = [f"{op}:{arch}" for op, arch in pairs]
    done = subprocess.run(
        [sys.executable, "-m", "support.aot", *names], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [AotReport(**json.loads(line)) for line in done.stdout.splitlines()]


_work: list[tuple[str, int, AotCase]] = []  # what forked children find by its index


def _report(index: int) -> AotReport:
    op, arch, case = _work[index]
    try:
        return AotReport(op, arch, kernel_name(case), case.name, *compile_case(case, arch))
    except Exception as error:
        root: BaseException = error  # the compiler wraps what went wrong in the place of each call
        while root.__cause__ is not None:
            root = root.__cause__
        words = "".join(traceback.format_exception(root, chain=False))
        return AotReport(op, arch, kernel_name(case), case.name, error=words[-4000:])


def main() -> None:
    for pair in sys.argv[1:]:
        op, _, arch = pair.partition(":")
        _work.extend((op, int(arch), case) for case in cases_for(op, int(arch)))
    with get_context("fork").Pool(os.cpu_count()) as pool:
        for report in pool.imap_unordered(_report, range(len(_work))):
            print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
