"""The command line, and what it means."""

import argparse
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from charonia.entrypoints.bench.prompts import add_length_flags, positive_int
from charonia.entrypoints.bench.serve.arrivals import Load
from charonia.entrypoints.bench.serve.summary import GOODPUT_NAMES
from charonia.entrypoints.bench.serve.target import DEFAULT_PORTS, Target, parse_url
from charonia.entrypoints.bench.serve.workload import DatasetWorkload, RandomWorkload, Workload
from charonia.errors import ConfigError

_SECONDS_OF_ARRIVALS = 30
_MIN_PROMPTS = 16
_PROMPTS_AT_ONCE = 128
_WARM_UP_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    _add_target_flags(parser.add_argument_group("server"))
    _add_load_flags(parser.add_argument_group("load; several values are measured one after the other"))
    _add_workload_flags(parser.add_argument_group("requests"))
    _add_report_flags(parser.add_argument_group("report"))


def _add_target_flags(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--backend", choices=list(DEFAULT_PORTS), default="triton-grpc",
        help="protocol: gRPC streaming (default), Triton's generate_stream, or the OpenAI API of the gateway",
    )  # fmt: skip
    ports = ", ".join(f"{name} {port}" for name, port in DEFAULT_PORTS.items())
    group.add_argument(
        "--url", default="127.0.0.1",
        help=f"[http|https|grpc|grpcs://]host[:port][/path] (default 127.0.0.1; ports: {ports})",
    )  # fmt: skip
    group.add_argument(
        "--model", default="llm", metavar="NAME", help="model of the server (default %(default)s)"
    )
    group.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="NAME=VALUE",
        help="of every request; may repeat",
    )
    group.add_argument(
        "--connections", type=positive_int, default=8, metavar="N",
        help="gRPC: TCP connections of each worker, at most one a user (default %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--requests-per-stream", type=positive_int, default=1, metavar="N",
        help="gRPC: requests that share one ModelStreamInfer call (default 1: a call for each concurrent request)",
    )  # fmt: skip
    group.add_argument(
        "--count-tokens", action=argparse.BooleanOptionalAction, default=True,
        help="gRPC: have every response say how many tokens it brings; without, the server's work is less, and each "
        "request is taken to have brought all the tokens that it asked for",
    )  # fmt: skip
    group.add_argument(
        "--metrics-url",
        metavar="URL",
        help="host:port of the server's metrics, to report its counters as well",
    )


def _add_load_flags(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--concurrency", type=positive_int, nargs="+", metavar="N",
        help="concurrent users, each of which sends its next request when it has its answer; with --request-rate, the "
        "most requests in flight",
    )  # fmt: skip
    group.add_argument(
        "--request-rate", type=_rate, nargs="+", metavar="RATE",
        help="requests a second that arrive, whatever the server does; inf: all at once (default inf)",
    )  # fmt: skip
    group.add_argument(
        "--burstiness", type=_positive_float, default=1.0, metavar="X",
        help="shape of the gamma distribution of the gaps between arrivals: 1 is a Poisson process (default), less "
        "comes in bursts",
    )  # fmt: skip
    group.add_argument(
        "--num-prompts", type=positive_int, metavar="N",
        help="requests of each run (default: --num-prompts-per-user; with a rate, what arrives in "
        f"{_SECONDS_OF_ARRIVALS} s; at least {_MIN_PROMPTS}; {_PROMPTS_AT_ONCE} if all come at once)",
    )  # fmt: skip
    group.add_argument(
        "--num-prompts-per-user", type=positive_int, default=8, metavar="N",
        help="requests of each run for each concurrent user (default %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--num-warmups", type=_natural, metavar="N",
        help="requests before each run, which are not counted (default: one a worker)",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=positive_int, default=max(1, (os.cpu_count() or 1) // 4), metavar="N",
        help="processes that generate load (default: a quarter of the cores, here %(default)s)",
    )  # fmt: skip


def _add_workload_flags(group: "argparse._ArgumentGroup") -> None:
    add_length_flags(group, input_len=512, output_len=128)
    group.add_argument(
        "--range-ratio", type=_ratio, default=0.0, metavar="R",
        help="draw lengths evenly from (1 - R) to (1 + R) times the above (default 0: exact)",
    )  # fmt: skip
    group.add_argument(
        "--prefix-len", type=_natural, default=0, metavar="N",
        help="tokens in front of each prompt that it shares with others (default 0)",
    )  # fmt: skip
    group.add_argument(
        "--num-prefixes",
        type=positive_int,
        default=1,
        metavar="N",
        help="different shared prefixes (default 1)",
    )
    group.add_argument(
        "--vocab-size", type=positive_int, default=30_000, metavar="N",
        help="random token ids are below N (default %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--dataset", type=Path, metavar="FILE",
        help='JSON lines instead of random ids: {"prompt": ...}, or text_input, token_ids, messages, and max_tokens '
        "(default --output-len)",
    )  # fmt: skip
    group.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="generate to the full length whatever the model says (default: yes)",
    )  # fmt: skip
    group.add_argument(
        "--sampling-params", type=_json_object, default={}, metavar="JSON",
        help="further sampling parameters; for the OpenAI API, further fields of the body (default: temperature 0)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="of prompts and arrivals (default 0)"
    )


def _add_report_flags(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--goodput", type=_limit, nargs="+", default=[], metavar="NAME:MS",
        help=f"count the requests that meet all of these limits; names: {', '.join(GOODPUT_NAMES)}",
    )  # fmt: skip
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    group.add_argument(
        "--requests", type=Path, metavar="FILE", help="write a JSON line for each request to FILE"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw throughput and latencies (svg, png, pdf)"
    )


def target(options: argparse.Namespace) -> Target:
    """The server that the flags name. Raises `ConfigError`."""
    address = parse_url(options.url, DEFAULT_PORTS[options.backend])
    path = address.path
    if options.backend.startswith("openai"):
        path = path.removesuffix("/v1")
    sampling = {"temperature": 0.0} | ({"ignore_eos": True} if options.ignore_eos else {})
    return Target(
        backend=options.backend,
        host=address.host,
        port=address.port,
        secure=address.secure,
        path=path,
        model=options.model,
        headers=tuple(options.header),
        sampling=sampling | options.sampling_params,
        requests_per_stream=options.requests_per_stream,
        connections=options.connections,
        count_tokens=options.count_tokens,
    )


def workloads(options: argparse.Namespace) -> tuple[Workload, RandomWorkload]:
    """What is measured, and what warms the server up. Raises `ConfigError`."""
    as_text = options.backend == "openai-chat"
    random = RandomWorkload(
        input_len=options.input_len,
        output_len=options.output_len,
        range_ratio=options.range_ratio,
        prefix_len=options.prefix_len,
        num_prefixes=options.num_prefixes,
        vocab_size=options.vocab_size,
        as_text=as_text,
    )
    if options.dataset is None:
        return random, replace(random, output_len=min(options.output_len, _WARM_UP_TOKENS))
    warm_up = RandomWorkload(32, _WARM_UP_TOKENS, 0.0, 0, 1, options.vocab_size, as_text=True)
    return DatasetWorkload.read(options.dataset, options.output_len), warm_up


def loads(options: argparse.Namespace) -> list[Load]:
    """Every run, in order."""
    rates = options.request_rate or [math.inf]
    return [Load(users, rate) for rate in rates for users in options.concurrency or [None]]


def num_prompts(options: argparse.Namespace, load: Load) -> int:
    """Requests of one run."""
    if options.num_prompts is not None:
        return int(options.num_prompts)
    if not load.is_closed_loop:
        return max(_MIN_PROMPTS, math.ceil(load.rate * _SECONDS_OF_ARRIVALS))
    if load.concurrency is None:
        return _PROMPTS_AT_ONCE
    return max(_MIN_PROMPTS, int(options.num_prompts_per_user) * load.concurrency)


def described(options: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON. Values of headers may be secrets and stay out."""
    hidden = {"run", "measure", "command", "kind", "header"}
    values = {
        name: value for name, value in vars(options).items() if name not in hidden and not callable(value)
    }
    values["header"] = [name for name, _ in options.header]
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str).replace("Infinity", '"inf"'))
    return plain


# ---- values ----


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _rate(text: str) -> float:
    return math.inf if text == "inf" else _positive_float(text)


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 up to 1")
    return value


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name.strip() or any(ord(char) < 32 for char in text):
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name.strip(), value.strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in GOODPUT_NAMES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(GOODPUT_NAMES)}")
    try:
        return name, _positive_float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:MILLISECONDS") from None


def check(options: argparse.Namespace) -> None:
    """Refuse what only makes no sense together. Raises `ConfigError`."""
    if options.requests_per_stream > 1 and options.backend != "triton-grpc":
        raise ConfigError("--requests-per-stream is for --backend triton-grpc")
    if not options.count_tokens and (options.backend != "triton-grpc" or not options.ignore_eos):
        raise ConfigError("--no-count-tokens is for --backend triton-grpc, with --ignore-eos")
    for path in (options.json, options.requests, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"there is no directory {path.absolute().parent}")
