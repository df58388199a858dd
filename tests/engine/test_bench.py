"""`charonia bench` on a model of its own."""

import json
from pathlib import Path

import pytest
from charonia.entrypoints import cli

SMALL = [
    "--load-format=dummy",
    "--dtype=float32",
    "--cpu-threads=1",
    "--max-model-len=64",
    "--max-num-seqs=4",
]


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("throughput", ["--num-prompts=6", "--input-len=10", "--output-len=5"], {"num_requests": 6, "output_len": 5}),
        ("latency", ["--batch-size=2", "--num-iters=3", "--input-len=10", "--output-len=5"], {"batch_size": 2}),
        ("steps", ["--rows", "1", "3", "--context=10", "--steps=6"], {"context": 10, "host_only": False}),
    ],
)  # fmt: skip
def test_bench(
    kind: str, flags: list[str], expected: dict[str, object], tiny_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "figures.json"
    assert cli.main(["bench", kind, str(tiny_dir), *flags, *SMALL, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures.items() >= expected.items()
    assert capsys.readouterr().out.strip()
    if kind == "throughput":
        assert figures["output_tokens_per_second"] * figures["elapsed_s"] == pytest.approx(30)
    elif kind == "latency":
        assert len(figures["latencies_s"]) == 3 and figures["median_first_token_s"] < figures["median_s"]
    else:
        assert [row["rows"] for row in figures["rows"]] == [1, 3]
