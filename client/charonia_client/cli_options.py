"""Command line of ``charonia-client``: its flags, and the request options they stand for."""

import argparse
import json
from typing import Any

from charonia_client.cli_gateway import add_gateway_command

DEFAULT_MAX_TOKENS = 256

_SAMPLING_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("--temperature", float, "0 always takes the most likely token"),
    ("--top-p", float, "sample from the most likely tokens of this total probability"),
    ("--top-k", int, "sample from this many of the most likely tokens"),
    ("--min-p", float, "leave out tokens below this fraction of the best one's probability"),
    ("--repetition-penalty", float, "above 1 discourages tokens seen before"),
    ("--presence-penalty", float, "above 0 discourages tokens generated before"),
    ("--frequency-penalty", float, "above 0 discourages tokens by how often they were generated"),
    ("--seed", int, "makes the answer reproducible"),
    ("--logprobs", int, "report this many alternatives per token (with --json)"),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` names the chosen one."""
    parser = argparse.ArgumentParser(
        prog="charonia-client", description="Talk to a Charonia model in a Triton server, over gRPC or HTTP."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="generate|stream|chat|health|gateway"
    )
    for name, text in (
        ("generate", "continue a prompt and print the whole answer"),
        ("stream", "continue a prompt and print the answer as it comes"),
        ("chat", "talk with the model; with a message, ask once"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        what = "message" if name == "chat" else "prompt"
        command.add_argument(
            "prompt", nargs="*", metavar=what, help=f"the {what}; from standard input if absent"
        )
        if name == "chat":
            command.add_argument("--system", help="system message that opens the conversation")
        _add_connection(command)
        _add_sampling(command)
    health = commands.add_parser(
        "health",
        help="show how the server and the model are",
        description="Exit status 0 if the model is ready.",
    )
    _add_connection(health)
    gateway = commands.add_parser(
        "gateway",
        help="serve the OpenAI API in front of a Triton server",
        description="An OpenAI-compatible HTTP server in front of a Charonia model in Triton. Ctrl-C stops it.",
    )
    add_gateway_command(gateway)
    return parser


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given; flags win over ``--sampling-params``."""
    names = [flag.lstrip("-").replace("-", "_") for flag, _, _ in _SAMPLING_FLAGS]
    given = {name: getattr(args, name) for name in (*names, "stop") if getattr(args, name) is not None}
    if args.ignore_eos:
        given["ignore_eos"] = True
    if args.max_tokens is not None:
        given["max_tokens"] = args.max_tokens
    return {"max_tokens": DEFAULT_MAX_TOKENS, **args.sampling_params, **given}


def _add_connection(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("connection")
    group.add_argument("--url", help="server, as [grpc|grpcs|http|https://]host[:port] (default: localhost)")
    group.add_argument(
        "--protocol", choices=("grpc", "http"), help="for a URL without a scheme (default: grpc)"
    )
    group.add_argument("--model", default="llm", help="model to ask (default: %(default)s)")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="cancel the request after this time")
    group.add_argument("--retries", type=int, default=2, help="if the server is away (default: %(default)s)")
    group.add_argument("--json", action="store_true", help="print JSON; one object a line when streaming")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling", "The server's defaults apply to what is not given.")
    group.add_argument("--max-tokens", type=int, help=f"length of the answer (default: {DEFAULT_MAX_TOKENS})")
    for flag, kind, text in _SAMPLING_FLAGS:
        group.add_argument(flag, type=kind, help=text)
    group.add_argument("--stop", action="append", help="end the answer at this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on to the full length")
    group.add_argument(
        "--sampling-params",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further parameters, as an object",
    )
    group.add_argument("--stats", action="store_true", help="print token counts and speed to standard error")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
