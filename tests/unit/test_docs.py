"""What the pages say is there: the model's tensors, the files that they name, what they link to."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from charonia.triton.contract import INPUTS, OUTPUTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("docker/*.md"),
    *ROOT.glob("benchmarks/*.md"),
]
PACKAGES = [
    ROOT, ROOT / "engine", ROOT / "engine/charonia", ROOT / "kernels", ROOT / "kernels/charonia_kernels",
    ROOT / "client/charonia_client", ROOT / "client/charonia_client/gateway",
]  # fmt: skip
"""Where the paths begin that `ARCHITECTURE.md` names."""


def test_every_tensor_is_described() -> None:
    inputs, outputs = (ROOT / "docs" / "tensors.md").read_text("utf-8").split("## Outputs")
    for text, specs in ((inputs, INPUTS), (outputs, OUTPUTS)):
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(spec.name for spec in specs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def expanded(path: str) -> Iterator[str]:
    """`a/{b,c}.py` is two paths."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        yield path
        return
    for choice in braces[1].split(","):
        yield from expanded(path[: braces.start()] + choice + path[braces.end() :])


def test_the_files_of_the_architecture_exist() -> None:
    named = re.findall(r"`([\w./{},]+/[\w./{},]+\.py)`", (ROOT / "ARCHITECTURE.md").read_text("utf-8"))
    paths = [path for name in named for path in expanded(name)]
    assert len(paths) > 50
    assert not [path for path in paths if not any((package / path).exists() for package in PACKAGES)]
