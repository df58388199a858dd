"""The page on the model's tensors names all of them, and no other."""

import re
from pathlib import Path

from charonia.triton.contract import INPUTS, OUTPUTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tensors.md"


def test_every_tensor_is_described() -> None:
    inputs, outputs = PAGE.read_text("utf-8").split("## Outputs")
    for text, specs in ((inputs, INPUTS), (outputs, OUTPUTS)):
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(spec.name for spec in specs)
