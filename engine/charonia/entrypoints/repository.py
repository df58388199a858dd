"""Builds the Triton model repository of one checkpoint from the packaged template, in a folder of its own."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from charonia.entrypoints.launch_error import LaunchError

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPLATE_NAME = "llm"
_RUNTIME_DIR_KEY = re.compile(r'(key\s*:\s*"runtime_dir"[^"]*?string_value\s*:\s*)"[^"]*"')


def check_checkpoint(model: str, *, needs_weights: bool = True) -> Path:
    """The absolute path of a Hugging Face model directory. Raises `LaunchError` that says what is missing."""
    path = Path(model).expanduser()
    if not path.exists():
        raise LaunchError(
            f"MODEL {model}: no such directory",
            "Give a local Hugging Face model directory (config.json, *.safetensors, tokenizer); "
            "models are not downloaded by name. Without MODEL, the embedded default is served.",
        )
    if not path.is_dir():
        raise LaunchError(f"MODEL {model}: a file; give the Hugging Face model directory around it")
    config = path / "config.json"
    try:
        content = json.loads(config.read_text("utf-8"))
    except FileNotFoundError:
        raise LaunchError(
            f"MODEL {model}: no config.json in it, so not a Hugging Face model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise LaunchError(f"MODEL {model}: config.json cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise LaunchError(f"MODEL {model}: config.json must hold a JSON object")
    if needs_weights and not any(path.glob("*.safetensors")):
        raise LaunchError(
            f"MODEL {model}: no *.safetensors file in it",
            "Only safetensors weights are loaded; --load-format dummy serves random ones.",
        )
    return path.resolve()


def check_model_name(name: str) -> str:
    """`name` where it can name a folder and stand in a URL; else raises `LaunchError`."""
    if not _MODEL_NAME.fullmatch(name):
        raise LaunchError(f"--model-name {name!r} may only hold letters, digits, '.', '_' and '-'")
    return name


def find_template() -> Path:
    """Folder of the packaged model (`config.pbtxt`, `1/model.py`): the installation's, or the checkout's."""
    package = Path(__file__).resolve().parents[1]
    candidates = [package / "model_repository" / _TEMPLATE_NAME]
    candidates.append(package.parents[1] / "model_repository" / _TEMPLATE_NAME)
    for candidate in candidates:
        if (candidate / "config.pbtxt").is_file():
            return candidate
    raise LaunchError(
        f"the model template is missing from this installation: no config.pbtxt in {candidates[0]}",
        "Reinstall charonia.",
    )


def build_repository(
    target: Path,
    *,
    model_name: str,
    settings: Mapping[str, object],
    instances: int,
    runtime_dir: Path,
    parameters: Mapping[str, str] | None = None,
    template: Path | None = None,
) -> Path:
    """Write a repository with one model.

    Args:
        target: folder to create; it becomes the repository.
        model_name: the model's name.
        settings: engine settings, for `1/model.json`.
        instances: number of model instances (frontends), all attached to one engine.
        runtime_dir: private folder for sockets and status files, as the model's parameter `runtime_dir`.
        parameters: more of the model's parameters, by name.
        template: the packaged model where None.

    Returns:
        The model's folder.
    """
    template = template or find_template()
    model = target / model_name
    target.mkdir(parents=True)
    shutil.copytree(template, model, ignore=shutil.ignore_patterns("__pycache__", "model.json"))
    config = configure(
        (template / "config.pbtxt").read_text("utf-8"),
        model_name=model_name,
        instances=instances,
        runtime_dir=runtime_dir,
    )
    for name, value in (parameters or {}).items():
        config += _parameter(name, value)
    (model / "config.pbtxt").write_text(config, "utf-8")
    (model / "1" / "model.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return model


def configure(config: str, *, model_name: str, instances: int, runtime_dir: Path) -> str:
    """The text of a `config.pbtxt` with the model's name, instance count and runtime folder put in.

    Raises `ValueError` where the template has no instance group with a count.
    """
    config = re.sub(r'(?m)^name\s*:\s*"[^"]*"', f"name: {_quote(model_name)}", config, count=1)
    config, replaced = re.subn(
        r"(instance_group\b[^}]*?\bcount\s*:\s*)\d+", rf"\g<1>{instances}", config, count=1
    )
    if not replaced:
        raise ValueError("config.pbtxt must state an instance_group with a count")
    value = _quote(str(runtime_dir))
    if _RUNTIME_DIR_KEY.search(config):
        return _RUNTIME_DIR_KEY.sub(lambda match: match[1] + value, config, count=1)
    return f"{config.rstrip()}\n\n" + _parameter("runtime_dir", str(runtime_dir))


def _parameter(name: str, value: str) -> str:
    """The declaration of a model parameter."""
    return f"parameters {{ key: {_quote(name)} value {{ string_value: {_quote(value)} }} }}\n"


def _quote(text: str) -> str:
    """A protobuf text-format string; JSON's escapes of ASCII and quotes are the same."""
    return json.dumps(text, ensure_ascii=False)
