"""Filling parameters: from safetensors, memory-mapped and copied once, or randomly for benchmarks."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from charonia.errors import ModelLoadError
from charonia.models.layers import WeightSlot

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints store although config.json determines them."""
_BASE_PREFIX = "model."
_NAMED_IN_ERRORS = 4
_SERIAL_BYTES = 32 << 20
"""Up to this size a tensor is copied by one thread: on a busy machine the slowest of a team arrives a time slice late,
which would cost each of hundreds of small tensors more than its copy takes."""
_SERIAL_ELEMENTS = 32_767
"""PyTorch copies so many elements without a team of threads."""


def load_safetensors(directory: Path, slots: Sequence[WeightSlot], passed_over: Collection[str] = ()) -> None:
    """Copy every tensor of a checkpoint from the mapped file into its slot, cast to the slot's dtype.

    A checkpoint that was saved without its output head (embedding models are) may leave out the prefix `model.`.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and the files that it names.
        slots: where the tensors go; each is written exactly once.
        passed_over: names of tensors that may be there, and that nobody reads.

    Raises:
        ModelLoadError: no safetensors, a truncated file, or tensors missing, unexpected or of another shape
            than config.json says (a few are named).
    """
    wanted = {slot.name: slot for slot in slots}
    seen: set[str] = set()
    unexpected: list[str] = []
    repeats: list[tuple[WeightSlot, torch.Tensor]] = []
    for name, tensor in _tensors(directory):
        slot = wanted.get(name) or wanted.get(f"{_BASE_PREFIX}{name}")
        if slot is None:
            if not name.endswith(_DERIVED_SUFFIXES) and name not in passed_over:
                unexpected.append(name)
            continue
        _check_shape(slot, tensor)
        seen.add(slot.name)
        if slot.alias:
            repeats.append((slot, tensor))
        else:
            _fill(slot, tensor)
    missing = [slot.name for slot in slots if slot.name not in seen and not slot.alias]
    if missing:
        raise ModelLoadError(f"checkpoint {str(directory)!r} lacks {_naming(missing)}")
    if unexpected:
        raise ModelLoadError(f"checkpoint {str(directory)!r} holds unexpected {_naming(unexpected)}")
    for slot, tensor in repeats:
        _check_repeat(slot, tensor)


def fill_random(slots: Iterable[WeightSlot], seed: int) -> None:
    """Give matrices random values that keep activations at unit scale; norms and biases stay as built.

    The values depend on the seed, the shapes and the kind of device, and on nothing else.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for slot in slots:
        target = slot.target
        if slot.alias or target.dim() < 2:
            continue
        if target.device not in generators:
            generators[target.device] = torch.Generator(device=target.device).manual_seed(seed)
        bound = (3.0 / target.shape[-1]) ** 0.5
        target.uniform_(-bound, bound, generator=generators[target.device])


def _fill(slot: WeightSlot, tensor: torch.Tensor) -> None:
    target = slot.target
    if target.device.type == "cpu" and target.dim() == 2 and tensor.nbytes <= _SERIAL_BYTES:
        rows = max(1, _SERIAL_ELEMENTS // target.shape[1])
        for part, source in zip(torch.split(target, rows), torch.split(tensor, rows), strict=True):
            part.copy_(source)
    else:
        target.copy_(tensor)
    if slot.offset:
        target.add_(slot.offset)


def _check_shape(slot: WeightSlot, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ModelLoadError(f"tensor {slot.name!r} holds {tensor.dtype}, not floating-point values")
    if tensor.shape != slot.target.shape:
        raise ModelLoadError(
            f"tensor {slot.name!r} has shape {list(tensor.shape)}, but by config.json it should have "
            f"{list(slot.target.shape)}"
        )


def _check_repeat(slot: WeightSlot, tensor: torch.Tensor) -> None:
    if not torch.equal(slot.target, tensor.to(slot.target.device, slot.target.dtype)):
        raise ModelLoadError(
            f"tensor {slot.name!r} differs from the embedding that config.json ties it to; "
            "set 'tie_word_embeddings' to false in config.json if the head is a matrix of its own"
        )


def _naming(names: Sequence[str]) -> str:
    """`1 tensor: a` or `9 tensors: a, b, c, d and 5 more`."""
    shown = ", ".join(names[:_NAMED_IN_ERRORS])
    rest = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {shown}{rest}"


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint in the order of the files; each is a view of the mapped file."""
    for path, names in _files(directory).items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                held = file.offset_keys()
                absent = [] if names is None else sorted(names.difference(held))
                if absent:
                    raise ModelLoadError(
                        f"{str(path)!r} lacks {_naming(absent)}, which {_INDEX_FILE} places there"
                    )
                for name in held:
                    if names is None or name in names:
                        yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{str(path)!r} is truncated or no safetensors file: {error}") from None


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """The checkpoint's files, each with the tensors to take from it (all of them if None)."""
    if (directory / _SINGLE_FILE).is_file():
        return {directory / _SINGLE_FILE: None}
    if (directory / _INDEX_FILE).is_file():
        return _indexed_files(directory)
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        raise ModelLoadError(
            f"checkpoint {str(directory)!r} has only pickled weights ({pickled[0]}), which may run "
            "code when loaded; safetensors only: convert it"
        )
    raise ModelLoadError(f"checkpoint {str(directory)!r} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")


def _indexed_files(directory: Path) -> dict[Path, set[str] | None]:
    index = directory / _INDEX_FILE
    try:
        placed: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{str(index)!r} is no index of safetensors files: {error!r}") from None
    files: dict[Path, set[str] | None] = {}
    for file_name in sorted({str(name) for name in placed.values()}):
        path = directory / file_name
        if Path(file_name).name != file_name or not path.is_file():
            raise ModelLoadError(f"{str(index)!r} names {file_name!r}, which is not in that directory")
        files[path] = {name for name, place in placed.items() if place == file_name}
    return files
