"""The packages of kernels are loaded when they are first used, and once. Each check has a process of its own."""

import subprocess
import sys
from textwrap import dedent

import pytest


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cpu_kernels_never_load_triton() -> None:
    run("""
        import sys
        import charonia_kernels, torch
        assert "numba" not in sys.modules and "charonia_kernels.cpu" not in sys.modules
        charonia_kernels.rms_norm(torch.ones(2, 32), torch.ones(32), 1e-6)
        assert "numba" in sys.modules
        assert "triton" not in sys.modules and "charonia_kernels.gpu" not in sys.modules
    """)


def test_gpu_kernels_never_load_numba() -> None:
    run("""
        import sys
        import charonia_kernels
        from charonia_kernels import gpu
        assert "triton" not in sys.modules
        assert callable(gpu.rms_norm)
        assert "triton" in sys.modules and "numba" not in sys.modules
        assert charonia_kernels.gpu is sys.modules["charonia_kernels.gpu"]
    """)


@pytest.mark.parametrize("package", ["cpu", "gpu"])
def test_a_module_imported_first_is_executed_once(package: str) -> None:
    run(f"""
        import sys
        from importlib import import_module
        executed = []

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                executed.extend([name] if name.startswith("charonia_kernels.{package}") else [])

        sys.meta_path.insert(0, Finder)
        norm = import_module("charonia_kernels.{package}.norm")
        import charonia_kernels
        assert "charonia_kernels.{package}.norm" in executed
        assert len(executed) == len(set(executed)), executed
        assert charonia_kernels.{package}.rms_norm is norm.rms_norm
    """)


def test_a_stand_in_shows_and_makes_the_changes_of_its_package() -> None:
    run("""
        from charonia_kernels import _backend, gpu
        from charonia_kernels.gpu import rms_norm
        import charonia_kernels
        assert gpu is _backend.gpu is not charonia_kernels.gpu
        gpu.rms_norm = None
        assert charonia_kernels.gpu.rms_norm is None and gpu.rms_norm is None
        charonia_kernels.gpu.rms_norm = rms_norm
        assert gpu.rms_norm is rms_norm
        gpu.other = 1
        del gpu.other
        assert not hasattr(charonia_kernels.gpu, "other")
    """)
