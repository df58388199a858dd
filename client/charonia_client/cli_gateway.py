"""The command ``charonia-client gateway``: its flags, and the settings they stand for."""

import argparse
import contextlib
import importlib
import re
import sys
from pathlib import Path

_INSTALL = "pip install 'charonia[gateway]'"
_MAX_KEYS = 10_000
_COMMENT = re.compile(r"(?:^|\s)#.*")
"""A key may have "#" in it, a comment has space in front."""


def add_gateway_command(command: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = command.add_argument_group("model")
    group.add_argument(
        "--triton",
        default="localhost:8001",
        metavar="HOST:PORT",
        help="Triton's gRPC address (default: %(default)s)",
    )
    group.add_argument("--model", default="llm", help="the model's name in Triton (default: %(default)s)")
    group.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which clients ask for the model (default: its name in Triton); may be repeated",
    )
    group.add_argument(
        "--tool-parser",
        "--tool-call-parser",
        default="auto",
        metavar="NAME",
        help="format of tool calls: auto (by the chat template), none, hermes, llama3_json, mistral, ...",
    )
    group.add_argument(
        "--reasoning-parser",
        default="auto",
        metavar="NAME",
        help="format of reasoning: auto (by the chat template), none, deepseek_r1, qwen3, ...",
    )
    group.add_argument(
        "--generation-config",
        choices=["auto", "vllm"],
        default="auto",
        help="what a request leaves open is sampled as the checkpoint's generation_config.json recommends (auto), "
        "or with temperature 1 and no filters (vllm)",
    )
    _add_server_flags(command.add_argument_group("server"))


def _add_server_flags(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=9000, help="(default: %(default)s)")
    group.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the port (default: %(default)s)",
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="require this key (or another one) on every route but /health; other users see it in the process list",
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="the same, with one key a line; # at its start or after a space begins a comment",
    )
    group.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin call the API ('*': of any); may be repeated",
    )
    group.add_argument(
        "--max-body-mib",
        type=int,
        default=16,
        metavar="MIB",
        help="longest request body (default: %(default)s)",
    )
    group.add_argument("--request-timeout", type=float, metavar="SECONDS", help="cancel what takes longer")
    group.add_argument(
        "--drain-timeout",
        type=int,
        default=30,
        metavar="SECONDS",
        help="how long answers may go on after SIGTERM (default: %(default)s)",
    )
    group.add_argument("--no-chat-page", action="store_true", help="do not serve the chat page at /")
    group.add_argument("--open-chat-page", action="store_true", help="serve the chat page without an API key")
    group.add_argument(
        "--enable-prompt-tokens-details",
        action="store_true",
        help="tell cached tokens in the usage of streams too",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send a span of each request to this OpenTelemetry collector",
    )
    group.add_argument("--access-log", action="store_true", help="log every request")


def run_gateway_command(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status: 2 for settings that cannot be."""
    try:
        server = importlib.import_module("charonia_client.gateway.server")
        settings_module = importlib.import_module("charonia_client.gateway.settings")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("charonia"):
            raise
        _complain(f"the gateway needs the package {error.name}; install it: {_INSTALL}")
        return 1
    try:
        settings = settings_module.GatewaySettings(
            triton=args.triton,
            model=args.model,
            served_model_names=tuple(args.served_model_name),
            api_keys=tuple(args.api_key) + _keys_in(args.api_key_file),
            tool_parser=_parser_name(args.tool_parser),
            reasoning_parser=_parser_name(args.reasoning_parser),
            allowed_origins=tuple(args.allowed_origin),
            max_body_bytes=args.max_body_mib << 20,
            request_timeout_s=args.request_timeout,
            chat_page=not args.no_chat_page,
            open_chat_page=args.open_chat_page,
            prompt_tokens_details=args.enable_prompt_tokens_details,
            otlp_traces_endpoint=args.otlp_traces_endpoint,
            recommended_sampling=args.generation_config == "auto",
        )
        listen = server.ListenSettings(
            host=args.host,
            port=args.port,
            workers=args.workers,
            access_log=args.access_log,
            drain_s=args.drain_timeout,
        )
        return int(server.run_gateway(settings, listen, _say_ready))
    except (ValueError, OSError) as error:
        _complain(str(error))
        return 2


def _keys_in(path: Path | None) -> tuple[str, ...]:
    """Raises ValueError for a file without keys: it would open every route."""
    if path is None:
        return ()
    lines = (_COMMENT.sub("", line).strip() for line in path.read_text().splitlines())
    keys = tuple(line for line in lines if line)
    if not 0 < len(keys) <= _MAX_KEYS:
        raise ValueError(f"{path} must have 1 to {_MAX_KEYS} keys, one a line, and has {len(keys)}")
    return keys


def _parser_name(name: str) -> str | None:
    return None if name == "none" else name


def _say_ready(url: str) -> None:
    # Where the output goes to a full disk, the API works all the same.
    with contextlib.suppress(OSError):
        print(f"OpenAI API at {url}/v1", flush=True)


def _complain(text: str) -> None:
    print(f"charonia-client: {text}", file=sys.stderr)
