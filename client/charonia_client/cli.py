"""The ``charonia-client`` command. Exit status: 0, 1 on an error, 2 on wrong usage, 130 on Ctrl-C."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from charonia_client.cli_gateway import run_gateway_command
from charonia_client.cli_options import build_parser, sampling_options
from charonia_client.client import CharoniaClient, ResponseStream
from charonia_client.errors import CharoniaClientError
from charonia_client.requests import Message
from charonia_client.results import GenerateResult, StreamChunk

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (line editing and history in `input`)

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "gateway":
        return run_gateway_command(args)
    try:
        client = CharoniaClient(args.url, protocol=args.protocol, retries=args.retries)
    except ValueError as error:
        parser.error(str(error))
    try:
        with client:
            return _COMMANDS[args.command](client, args)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; nothing may be flushed to it on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CharoniaClientError as error:
        _complain(error)
        return 1


def _generate(client: CharoniaClient, args: argparse.Namespace) -> int:
    started = time.monotonic()
    result = client.generate(_prompt(args), **_options(args))
    if args.json:
        print(_json(result))
    else:
        for sequence in result.sequences:
            print(sequence.text)
    if args.stats:
        _print_stats(result, time.monotonic() - started, None)
    return 0


def _stream(client: CharoniaClient, args: argparse.Namespace) -> int:
    _print_stream(client.stream(_prompt(args), **_options(args)), args)
    return 0


def _chat(client: CharoniaClient, args: argparse.Namespace) -> int:
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    if not args.prompt and sys.stdin.isatty():
        return _converse(client, args, opening)
    messages = [*opening, {"role": "user", "content": _prompt(args)}]
    _print_stream(client.chat(messages, stream=True, **_options(args)), args)
    return 0


def _converse(client: CharoniaClient, args: argparse.Namespace, opening: list[dict[str, str]]) -> int:
    """Talk until the end of input. Ctrl-C ends the answer that is being given, or the conversation."""
    print("Ctrl-C stops an answer, /reset starts anew, /exit or Ctrl-D ends.", file=sys.stderr)
    messages: list[Message] = [*opening]
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            messages = [*opening]
        elif text:
            turn = {"role": "user", "content": text}
            answer = _answer(client, args, [*messages, turn])
            if answer is not None:
                messages += [turn, {"role": "assistant", "content": answer}]


def _answer(client: CharoniaClient, args: argparse.Namespace, messages: list[Message]) -> str | None:
    """Print the next answer; None if it failed or was stopped, and the conversation goes on without the
    turn.
    """
    try:
        return _print_stream(client.chat(messages, stream=True, **_options(args)), args).text
    except KeyboardInterrupt:
        print("[stopped]", file=sys.stderr)
    except CharoniaClientError as error:
        _complain(error)
    return None


def _print_stream(stream: ResponseStream, args: argparse.Namespace) -> GenerateResult:
    started = time.monotonic()
    first: float | None = None
    chunks: list[StreamChunk] = []
    try:
        with stream:
            for chunk in stream:
                first = first or time.monotonic() - started
                chunks.append(chunk)
                print(_json(chunk) if args.json else chunk.text, end="\n" if args.json else "", flush=True)
    finally:
        if chunks and not args.json:
            print()
    result = GenerateResult.from_chunks(chunks)
    if args.stats:
        _print_stats(result, time.monotonic() - started, first)
    return result


def _print_stats(result: GenerateResult, seconds: float, first: float | None) -> None:
    parts = [f"{seconds:.2f} s"] if first is None else [f"first token {first:.2f} s", f"all {seconds:.2f} s"]
    if result.usage is not None:
        count = result.usage.num_output_tokens
        tokens = f"{result.usage.num_input_tokens} tokens in, {count} out"
        parts = [tokens, *parts, f"{count / seconds:.1f} tokens/s"]
    print(f"[{', '.join(parts)}]", file=sys.stderr)


def _health(client: CharoniaClient, args: argparse.Namespace) -> int:
    limit = args.timeout or 5.0
    health = client.health(args.model, timeout=limit)
    server = client.server_metadata(timeout=limit)
    if args.json:
        print(
            json.dumps(
                {"url": client.url, **dataclasses.asdict(health), "server": dataclasses.asdict(server)}
            )
        )
    else:
        print(f"{server.name} {server.version} at {client.url}: {'ready' if health.ready else 'not ready'}")
        print(f"model {health.model!r}: {'ready' if health.model_ready else 'not ready, or not there'}")
    return 0 if health.model_ready else 1


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": args.model,
        "timeout": args.timeout,
        "sampling_params": sampling_options(args),
    }
    if args.json:
        options["return_token_ids"] = True
    return options


def _prompt(args: argparse.Namespace) -> str:
    return " ".join(args.prompt) if args.prompt else sys.stdin.read()


def _json(output: GenerateResult | StreamChunk) -> str:
    return json.dumps(dataclasses.asdict(output), ensure_ascii=False)


def _complain(error: CharoniaClientError) -> None:
    print(f"charonia-client: {error}", file=sys.stderr)


_COMMANDS = {"generate": _generate, "stream": _stream, "chat": _chat, "health": _health}
