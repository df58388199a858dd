"""The kernels compiled ahead of time, as real models' launches would have them: they fit the hardware.

All specialisations are compiled for sm_90, the first of each kernel for sm_80 and sm_100 too.
"""

import ast
from collections.abc import Callable
from pathlib import Path

import charonia_kernels
import pytest
from support.aot import FULL_ARCH, MAX_SHARED_BYTES, AotReport, all_cases, kernel_name, op_names, reports

PACKAGE = Path(charonia_kernels.__file__).parent / "gpu"
HOPPER_ALONE = {"attention_decode_hopper", "attention_prefill_hopper", "linear_hopper"}
PAIRS = [
    (op, arch)
    for op in op_names()
    for arch in MAX_SHARED_BYTES
    if arch == FULL_ARCH or op not in HOPPER_ALONE
]
MAX_REGISTERS = 255  # of a thread, in the instruction set
MAX_LOCAL_BYTES = 80
"""Stack and spills of a thread: most kernels have none, some of the largest tiles a few registers."""


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> list[AotReport]:
    """Reports for the tests that were selected. One process compiles them all: starting it takes seconds."""
    chosen = {
        (item.callspec.params["op"], item.callspec.params["arch"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item, "callspec")
    }
    return reports([pair for pair in PAIRS if pair in chosen])


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first one waits for all
@pytest.mark.parametrize(("op", "arch"), PAIRS)
def test_kernels_fit_the_hardware(
    op: str, arch: int, compiled: list[AotReport], record_property: Callable[[str, object], None]
) -> None:
    found = [report for report in compiled if (report.op, report.arch) == (op, arch)]
    assert found
    misfits = []
    for report in found:
        kernel = report.kernel.rpartition(".")[2]
        taken = f"{report.registers} registers, {report.local_bytes} local, {report.shared_bytes} shared"
        line = f"sm_{arch} {kernel} {report.name}: {report.error or taken}"
        print(line)
        record_property(f"{kernel} {report.name}", taken)
        fits = report.shared_bytes <= MAX_SHARED_BYTES[arch] and report.local_bytes <= MAX_LOCAL_BYTES
        if report.error or not fits or not 0 < report.registers <= MAX_REGISTERS:
            misfits.append(line)
        misfits += [f"{kernel} {report.name}: {both}" for both in report.shared_barriers]
    assert not misfits, "\n".join(misfits)


def test_every_kernel_that_is_launched_has_cases() -> None:
    launched = set[str]()
    for path in PACKAGE.glob("*.py"):
        launched |= launched_kernels(ast.parse(path.read_text()), f"charonia_kernels.gpu.{path.stem}")
    assert {name.split(".")[2] for name in launched} >= {"norm", "attention_prefill_hopper", "linear_hopper"}
    assert launched == {kernel_name(case) for op in op_names() for case in all_cases(op)}


def launched_kernels(tree: ast.Module, module: str) -> set[str]:
    """Modules and names of what a module calls as `kernel[grid](...)`; unknown names count as the module's own."""
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }
    return {imported.get(name, f"{module}.{name}") for name in names}
