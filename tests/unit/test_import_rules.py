"""Who may import whom, as `pyproject.toml` states it, and what an import really loads."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("package", "heavy"),
    [
        ("charonia", {"torch", "transformers", "tokenizers"}),
        ("charonia.core", {"torch", "transformers", "tokenizers", "numpy"}),
        ("charonia.text", {"torch", "charonia_kernels"}),
        ("charonia.entrypoints.default_model", {"torch", "transformers", "numpy", "gguf"}),
        ("charonia_client", {"torch", "transformers", "charonia", "charonia_kernels"}),
    ],
)
def test_importing_a_package_loads_nothing_heavy(package: str, heavy: set[str]) -> None:
    program = f"import sys, {package}; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert imported.returncode == 0, imported.stderr
    assert heavy & set(imported.stdout.split()) == set()
