"""One model made ready to be served: repository, runtime folder, and the servers that run over them."""

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from charonia.config import EngineConfig
from charonia.entrypoints.ports import PortUse
from charonia.entrypoints.processes import LaunchToken, launch_folder
from charonia.entrypoints.repository import build_repository, check_checkpoint, check_model_name
from charonia.entrypoints.triton_server import TritonServer


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What to serve, and where."""

    model: str
    """A Hugging Face model directory."""
    engine: Mapping[str, object] = field(default_factory=dict)
    """Engine settings other than the model, by their names in `EngineConfig`."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the model's `config.pbtxt`, by name."""
    model_name: str = "llm"
    instances: int = 1
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    server: str | None = None
    """The server's binary or folder; found where None."""
    log_file: Path | None = None
    exit_timeout_s: int = 30
    verbose: bool = False

    @property
    def ports(self) -> tuple[PortUse, ...]:
        """The server's ports."""
        return (
            PortUse("HTTP", self.http_port, "--http-port"),
            PortUse("gRPC", self.grpc_port, "--grpc-port"),
            PortUse("metrics", self.metrics_port, "--metrics-port"),
        )


class Deployment:
    """The files of one served model, in a private temporary folder that the context removes.

    Raises `LaunchError` or `ConfigError` where the settings are wrong, before anything is written.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        needs_weights = settings.engine.get("load_format") != "dummy"
        model = check_checkpoint(settings.model, needs_weights=needs_weights)
        self._engine = {"model": str(model), **settings.engine}
        if isinstance(tokenizer := self._engine.get("tokenizer"), str):
            self._engine["tokenizer"] = str(Path(tokenizer).expanduser().absolute())
        EngineConfig.from_mapping(self._engine)
        check_model_name(settings.model_name)
        self.folder = launch_folder(LaunchToken.fresh(), "serve")

    def __enter__(self) -> Self:
        self.folder.mkdir(mode=0o700)
        build_repository(
            self.folder / "repository",
            model_name=self.settings.model_name,
            settings=self._engine | self._ascii_paths(),
            instances=self.settings.instances,
            runtime_dir=self.runtime_dir,
            parameters=self.settings.parameters,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ascii_paths(self) -> dict[str, str]:
        """Links to those folders of the settings whose names the server's stubs cannot open: outside ASCII."""
        links: dict[str, str] = {}
        for key in ("model", "tokenizer"):
            target = self._engine.get(key)
            if isinstance(target, str) and not target.isascii():
                link = self.folder / key
                link.symlink_to(target)
                links[key] = str(link)
        return links

    @property
    def runtime_dir(self) -> Path:
        """Where frontends and engine keep their sockets and status files."""
        return self.folder / "run"

    @property
    def log_path(self) -> Path:
        """The servers' log."""
        return self.settings.log_file or self.folder / "server.log"

    def make_server(self) -> TritonServer:
        """A server over these files, not started yet, with an empty runtime folder."""
        shutil.rmtree(self.runtime_dir, ignore_errors=True)
        self.runtime_dir.mkdir(mode=0o700)
        settings = self.settings
        return TritonServer(
            self.folder / "repository",
            http_port=settings.http_port,
            grpc_port=settings.grpc_port,
            metrics_port=settings.metrics_port,
            host=settings.host,
            extra_args=[*_without_side_doors(), *(["--log-verbose=1"] if settings.verbose else [])],
            log_path=self.log_path,
            exit_timeout_s=settings.exit_timeout_s,
            server=settings.server,
        )


def _without_side_doors() -> list[str]:
    """The server's arguments that close its APIs which no user of a model needs.

    Shared memory lets clients name regions of this machine, and the settings of traces and logs name files to write.
    They are asked for a header with a key that nobody has. Loading models is off unless the server is told otherwise.
    """
    restricted = f"shared-memory,trace,logging:charonia-restricted={secrets.token_urlsafe(32)}"
    return [f"--http-restricted-api={restricted}", f"--grpc-restricted-protocol={restricted}"]
