"""`charonia bench serve` without a server: its figures, its arrivals, its requests, and how it reads the wire."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from charonia.entrypoints import cli
from charonia.entrypoints.bench import command
from charonia.entrypoints.bench.serve import options as flags
from charonia.entrypoints.bench.serve.arrivals import Load, arrival_times
from charonia.entrypoints.bench.serve.command import Measurement
from charonia.entrypoints.bench.serve.driver import Outcome, Run, shares
from charonia.entrypoints.bench.serve.plot import draw
from charonia.entrypoints.bench.serve.records import Records, RequestRecord
from charonia.entrypoints.bench.serve.report import Point, point_json, point_text, sweep_text
from charonia.entrypoints.bench.serve.server_metrics import ServerMetrics
from charonia.entrypoints.bench.serve.summary import summarise
from charonia.entrypoints.bench.serve.target import parse_url
from charonia.entrypoints.bench.serve.workload import BenchRequest, DatasetWorkload, RandomWorkload
from charonia.errors import ConfigError

MS = 1_000_000
START = 10**12


def request(
    index: int, sent: float, times: list[float], tokens: list[int], *, prompt: int = 10, error: str | None = None,
    reported: int | None = None, ended: float | None = None,
) -> RequestRecord:  # fmt: skip
    """A request that has ended; times in milliseconds since the start."""
    record = RequestRecord(index, lambda _: None, START, prompt_tokens=prompt, reported_tokens=reported)
    record.sent_ns = START + round(sent * MS)
    for at, count in zip(times, tokens, strict=True):
        record.respond(START + round(at * MS), count)
    record.end(START + round((times[-1] if ended is None else ended) * MS), error)
    return record


# ---- figures ----


def test_figures_of_hand_made_requests() -> None:
    records = Records.of(
        [
            request(0, 0, [100, 120, 160], [1, 1, 1]),
            request(1, 50, [250, 350], [1, 4]),
            request(2, 100, [400], [1], prompt=7),
            request(3, 100, [150], [1], error="broken", ended=1000),
        ],
        START,
    )
    run = summarise(records, {"ttft": 200.0, "tpot": 26.0})
    assert (run.completed, run.failed, run.errors) == (3, 1, {"broken": 1})
    assert (run.prompt_tokens, run.output_tokens, run.num_responses) == (27, 9, 6)
    assert run.duration_s == pytest.approx(1.0)
    assert (run.request_throughput, run.output_throughput, run.total_throughput) == pytest.approx((3, 9, 36))
    assert run.tokens_per_response == pytest.approx(1.5)
    assert run.mean_concurrency == pytest.approx(0.16 + 0.3 + 0.3)
    assert run.ttft is not None and run.itl is not None and run.tpot is not None and run.e2el is not None
    assert (run.ttft.count, run.ttft.mean, run.ttft.p50, run.ttft.max) == pytest.approx((3, 200, 200, 300))
    assert (run.itl.count, run.itl.mean, run.itl.p50, run.itl.max) == pytest.approx((3, 160 / 3, 40, 100))
    # (160 - 100) / 2 and (350 - 250) / 4; the third has a single token
    assert (run.tpot.count, run.tpot.mean, run.tpot.max) == pytest.approx((2, 27.5, 30))
    assert (run.e2el.p50, run.e2el.p90) == pytest.approx((300, 300))
    # ttft: 100, 200, 300; tpot: 30, 25, none: only the second meets both
    assert run.goodput == pytest.approx(1.0)


def test_percentiles_are_interpolated() -> None:
    run = summarise(Records.of([request(i, 0, [float(i)], [1]) for i in range(1, 102)], START), {})
    assert run.ttft is not None
    assert (run.ttft.p50, run.ttft.p90, run.ttft.p95, run.ttft.p99) == pytest.approx((51, 91, 96, 100))
    assert run.goodput is None and run.tpot is None and run.itl is None


def test_nothing_at_all_and_nothing_but_failures() -> None:
    empty = summarise(Records.of([], START), {"ttft": 1.0})
    assert (empty.completed, empty.failed, empty.duration_s, empty.goodput, empty.ttft) == (
        0,
        0,
        0.0,
        0.0,
        None,
    )
    failed = summarise(Records.of([request(0, 0, [], [], error="no", ended=5)], START), {})
    assert (failed.completed, failed.failed, failed.request_throughput) == (0, 1, 0.0)


def test_a_request_ends_once_and_needs_tokens() -> None:
    ended: list[RequestRecord] = []
    record = RequestRecord(0, ended.append)
    record.end(5)
    record.end(6, "later")
    assert ended == [record] and record.error == "the answer has no tokens" and record.ended_ns == 5


def test_runs_of_several_processes_are_one() -> None:
    parts = [Records.of([request(0, 0, [1, 2], [1, 1])], START), Records.of([], START)]
    parts.append(Records.of([request(1, 0, [4, 9], [1, 3], reported=7)], START))
    both = Records.concat(parts)
    assert both.index.tolist() == [0, 1] and both.output_tokens.tolist() == [2, 7]
    assert both.times.tolist() == pytest.approx([0.001, 0.002, 0.004, 0.009])
    run = summarise(both, {})
    assert run.itl is not None and (run.itl.count, run.itl.max) == (2, pytest.approx(5))


# ---- arrivals ----


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 9.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    times = arrival_times(np.random.default_rng(1), 20_000, 50.0, burstiness)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all() and times[-1] == pytest.approx(20_000 / 50.0)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    if burstiness == 1.0:  # exponential: so much is longer than its mean
        assert (gaps > gaps.mean()).mean() == pytest.approx(math.exp(-1), abs=0.01)
    again = arrival_times(np.random.default_rng(1), 20_000, 50.0, burstiness)
    assert np.array_equal(times, again)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(np.random.default_rng(1), 3, math.inf, 1.0).tolist() == [0.0, 0.0, 0.0]
    assert Load(4, math.inf).is_closed_loop and Load(1, math.inf).label == "1 user"
    assert (Load(None, math.inf).label, Load(8, 2.5).label) == ("inf req/s", "8 users, 2.5 req/s")


def test_shares_deal_users_and_requests() -> None:
    requests = [BenchRequest(1, text=str(i)) for i in range(11)]
    plans = shares(Run(Load(3, math.inf), requests, np.arange(11) / 10, requests[:3]), 2)
    assert [plan.concurrency for plan in plans] == [2, 1]
    assert [list(plan.indices) for plan in plans] == [[0, 2, 3, 5, 6, 8, 9], [1, 4, 7, 10]]
    assert [each.text for each in plans[1].requests] == ["1", "4", "7", "10"]
    assert plans[1].arrivals == pytest.approx([0.1, 0.4, 0.7, 1.0])
    assert [len(plan.warmups) for plan in plans] == [2, 1]
    unlimited = shares(Run(Load(None, 5.0), requests, np.arange(11.0), []), 3)
    assert [plan.concurrency for plan in unlimited] == [None] * 3
    assert sorted(i for plan in unlimited for i in plan.indices) == list(range(11))


# ---- requests ----


def ids(requests: list[BenchRequest]) -> list[list[int]]:
    return [each.token_ids.tolist() for each in requests if each.token_ids is not None]


def test_random_prompts_have_exact_lengths_and_shared_prefixes() -> None:
    workload = RandomWorkload(20, 7, 0.0, 5, 2, 100, as_text=False)
    requests = workload.requests(np.random.default_rng(3), 6)
    prompts = ids(requests)
    assert [len(prompt) for prompt in prompts] == [25] * 6 and {each.max_tokens for each in requests} == {7}
    assert prompts[0][:5] == prompts[2][:5] != prompts[1][:5] == prompts[3][:5]
    assert len({tuple(prompt[5:]) for prompt in prompts}) == 6 and max(map(max, prompts)) < 100
    assert ids(workload.requests(np.random.default_rng(3), 6)) == prompts
    assert ids(workload.requests(np.random.default_rng(4), 6)) != prompts


def test_random_lengths_stay_in_their_range() -> None:
    requests = RandomWorkload(100, 10, 0.5, 0, 1, 50, as_text=False).requests(np.random.default_rng(0), 2000)
    lengths, outputs = [each.prompt_tokens for each in requests], [each.max_tokens for each in requests]
    assert (min(lengths), max(lengths), min(outputs), max(outputs)) == (50, 150, 5, 15)
    assert np.mean(lengths) == pytest.approx(100, abs=2)


def test_words_instead_of_ids() -> None:
    (made,) = RandomWorkload(12, 3, 0.0, 0, 1, 50, as_text=True).requests(np.random.default_rng(0), 1)
    assert made.token_ids is None and made.text is not None and len(made.text.split()) == 12


def test_dataset(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a"}, {"text_input": "b", "max_tokens": 3}, {"token_ids": [5, 6]},
        {"messages": [{"role": "user", "content": "c"}], "other": 1},
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    workload, rng = DatasetWorkload.read(path, 9), np.random.default_rng(0)
    first = workload.requests(rng, 3)
    assert [(each.text, each.max_tokens) for each in first] == [("a", 9), ("b", 3), (None, 9)]
    assert ids(first) == [[5, 6]]
    second = workload.requests(rng, 2)
    assert second[0].messages == [{"role": "user", "content": "c"}] and second[1].text == "a"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2"), ("[]", "line 1"), ("{}", "line 1: give one of"),
        ('{"prompt": "a", "token_ids": [1]}', "give one of"), ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        ('{"token_ids": [4294967296]}', "line 1"), ("\n", "no lines"),
    ],
)  # fmt: skip
def test_bad_datasets_are_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        DatasetWorkload.read(path, 9)
    with pytest.raises(ConfigError, match="cannot be read"):
        DatasetWorkload.read(tmp_path / "none", 9)


class NoFleet:
    """Keeps the runs that it is asked for."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def run(self, run: Run, on_ready: Callable[[], None], on_progress: Callable[[int], None]) -> Outcome:
        self.runs.append(run)
        return Outcome(Records.of([], START), (0.0,), 1.0, 0.0, interrupted=False)


def test_every_run_has_prompts_of_its_own_and_a_seed_repeats_them() -> None:
    def prompts_and_arrivals(*arguments: str) -> list[tuple[list[list[int]], list[float]]]:
        measurement, workers = Measurement(parsed(*arguments, "--num-prompts=5", "--input-len=6")), NoFleet()
        for number in range(2):
            measurement.measure(workers, Load(None, 2.0), number)  # type: ignore[arg-type]
        assert [len(run.warmups) for run in workers.runs] == [3, 3]
        return [(ids(list(run.requests)), run.arrivals.tolist()) for run in workers.runs]

    first, second = prompts_and_arrivals("--workers=3")
    assert first[0] != second[0] and first[1] != second[1] and len(first[0]) == 5
    assert prompts_and_arrivals("--workers=3") == [first, second]
    assert prompts_and_arrivals("--num-warmups=3", "--seed=1")[0] != first


# ---- flags ----


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    return parser.parse_args(arguments)


def test_flags_make_loads_and_counts() -> None:
    options = parsed("--concurrency", "1", "64", "--goodput", "ttft:200", "e2el:1e3")
    assert [flags.num_prompts(options, load) for load in flags.loads(options)] == [16, 512]
    assert dict(options.goodput) == {"ttft": 200.0, "e2el": 1000.0}
    options = parsed("--request-rate", "0.1", "20", "inf")
    assert [flags.num_prompts(options, load) for load in flags.loads(options)] == [16, 600, 128]
    options = parsed("--request-rate", "2", "4", "--concurrency", "8", "--num-prompts", "5")
    assert flags.loads(options) == [Load(8, 2.0), Load(8, 4.0)]
    assert flags.num_prompts(options, Load(8, 2.0)) == 5


def test_flags_make_a_target() -> None:
    options = parsed(
        "--backend", "openai", "--url", "https://host/api/v1/", "--no-ignore-eos", "--header", "Authorization=Bearer x",
        "--sampling-params", '{"temperature": 1, "top_p": 0.5}',
    )  # fmt: skip
    target = flags.target(options)
    assert (target.host, target.port, target.secure, target.path) == ("host", 9000, True, "/api")
    assert target.sampling == {"temperature": 1, "top_p": 0.5}
    assert target.headers == (("Authorization", "Bearer x"),)
    described = flags.described(options)
    assert described["header"] == ["Authorization"] and "Bearer" not in json.dumps(described)
    assert flags.target(parsed("--url", "[::1]:5")).authority == "[::1]:5"
    assert flags.target(parsed()).sampling == {"temperature": 0.0, "ignore_eos": True}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--goodput", "ttft"], ["--goodput", "itl:5"], ["--goodput", "ttft:-1"], ["--request-rate", "0"],
        ["--request-rate", "nan"], ["--concurrency", "0"], ["--range-ratio", "1"], ["--header", "a"],
        ["--header", "a=b\nc"], ["--sampling-params", "[]"], ["--num-warmups", "-1"], ["--backend", "grpc"],
    ],
)  # fmt: skip
def test_bad_flags_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert arguments[0] in capsys.readouterr().err


def test_bad_urls_and_combinations_are_refused(tmp_path: Path) -> None:
    for url in ("ftp://a", "http://", "a:x", "http://u@h", "h?q"):
        with pytest.raises(ConfigError, match="--url"):
            parse_url(url, 1)
    with pytest.raises(ConfigError, match="triton-grpc"):
        flags.check(parsed("--backend", "openai", "--requests-per-stream", "2"))
    with pytest.raises(ConfigError, match="no directory"):
        flags.check(parsed("--json", str(tmp_path / "none" / "a.json")))
    flags.check(parsed("--json", str(tmp_path / "a.json")))


# ---- reports ----


def test_reports_say_what_was_measured(tmp_path: Path) -> None:
    good = Records.of([request(0, 0, [100, 120], [1, 1]), request(1, 0, [1], [1], error="E", ended=9)], START)
    summary = summarise(good, {"ttft": 50.0})
    points = [
        Point(Load(4, math.inf), summary, 0.9, 12.0, 7.0, False, {"steps_total": 3.0}),
        Point(Load(None, 2.0), summarise(Records.of([], START), {}), 0.1, 0.0, 0.0, True, None),
    ]
    text = point_text(points[0])
    for part in (
        "4 users: 1 requests",
        "1 failed",
        "1 x E",
        "steps_total",
        "goodput",
        "TTFT",
        "raise --workers",
        "7.0 ms late",
    ):
        assert part in text
    assert "interrupted" in point_text(points[1]) and "TTFT" not in point_text(points[1])
    table = sweep_text(points).splitlines()
    assert len(table) == 5 and table[0].split()[0] == "load" and table[0].endswith("goodput")
    assert len({len(line) for line in table[:4]}) == 1
    row = json.loads(json.dumps(point_json(points[0]), allow_nan=False))
    assert (row["concurrency"], row["request_rate"], row["ttft"]["p50"]) == (4, "inf", pytest.approx(100.0))
    assert len(row["warnings"]) == 2


def test_plot(tmp_path: Path) -> None:
    summary = summarise(Records.of([request(0, 0, [100, 120], [1, 1])], START), {"ttft": 50.0})
    points = [Point(Load(users, math.inf), summary, 0.1, 1.0, 0.0, False, None) for users in (1, 4)]
    draw(points, "a title", tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_plot_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "serve", "--plot", str(tmp_path / "a.svg")]) == 1
    assert "charonia[bench]" in capsys.readouterr().err


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="hpack")

    monkeypatch.setattr(command.importlib, "import_module", missing)
    parser = argparse.ArgumentParser(prog="charonia bench")
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["serve"])
    assert "bench serve needs the package hpack: pip install 'charonia[bench]'" in capsys.readouterr().err


def test_server_metrics_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = ServerMetrics("host:1")
    texts = iter(
        [
            'charonia_steps_total{model="a"} 5\ncharonia_steps_total{model="b"} 1\nnv_x 3\n',
            'charonia_steps_total{model="a"} 7\ncharonia_requests_waiting{model="a"} 4\n',
            'charonia_steps_total{model="a"} 9\ncharonia_steps_total{model="b"} 1\ncharonia_preemptions_total 0\n',
        ]
    )
    monkeypatch.setattr("charonia.entrypoints.bench.serve.server_metrics._PUSH_PERIOD_S", 0.0)
    monkeypatch.setattr(metrics, "_fetch", lambda: next(texts))
    metrics.begin()
    metrics.sample()
    metrics.sample()  # too early for another
    assert metrics.end() == {"steps_total": 4.0, "max_requests_waiting": 4.0}
