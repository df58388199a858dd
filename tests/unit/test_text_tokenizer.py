"""The tokenizer against transformers' own, and loading from directories of every shape."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from charonia.entrypoints.default_model import ensure_default_model
from charonia.errors import InvalidRequestError, ModelLoadError
from charonia.text import Tokenizer
from support.text_tokenizers import gpt2_like, llama2_like, smollm2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  \n\n\t",
    "1234567890 3.14159 0xDEADBEEF",
    "def f(x):\n    return {k: v for k, v in x.items()}  # 日本語",
    "naïve café — “quotes” … ½ №",
    "Привет, мир! 你好,世界。こんにちは 안녕하세요 שלום مرحبا नमस्ते สวัสดี ខ្មែរ",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 emoji\ufe0f \u200d zero\u200bwidth",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "text<|im_end|>text <|im_end |> <|im_start|><|im_start|>",
    "nul\0inside and \x01\x02 control",
    "e\u0301 combining vs é",
    "\U0010ffff \ue000 \ufffd",
    "a" * 3000,
]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ensure_default_model())


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_as_transformers_do(text: str, reference: PreTrainedTokenizerFast) -> None:
    tokenizer = smollm2()
    for add_special_tokens in (True, False):
        ids = tokenizer.encode(text, add_special_tokens)
        assert ids == reference.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip) == expected


def test_facts_of_the_default_model(reference: PreTrainedTokenizerFast) -> None:
    tokenizer = smollm2()
    assert tokenizer.vocab_size == len(reference) == 49_152
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.eos_token_ids == {reference.eos_token_id}
    assert tokenizer.special_ids >= set(reference.all_special_ids)
    assert tokenizer.special_tokens == reference.special_tokens_map
    assert tokenizer.chat_template() == reference.chat_template
    assert tokenizer.token_to_id("<|im_start|>") == 1
    assert tokenizer.token_to_str(1) == "<|im_start|>"
    assert tokenizer.token_to_str(10**6) is None


def test_encode_adds_the_beginning_of_sequence_token() -> None:
    tokenizer = Tokenizer(llama2_like())
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\udc80abc"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        smollm2().encode(text)


def test_encode_refuses_what_is_no_text() -> None:
    with pytest.raises(InvalidRequestError, match="must be a string"):
        smollm2().encode(b"bytes")  # type: ignore[arg-type]


def test_threads_share_a_tokenizer() -> None:
    tokenizer = Tokenizer.from_dir(ensure_default_model())
    expected = [tokenizer.encode(text) for text in TEXTS]
    texts = [tokenizer.decode(ids) for ids in expected]
    fresh = Tokenizer.from_dir(ensure_default_model())
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(fresh.encode, TEXTS)) == expected
            assert list(pool.map(fresh.decode, expected)) == texts


@pytest.mark.parametrize("ids", [[-1], [49_152], [True], ["1"], [1.0], [None], [2**40]])
def test_validate_ids_refuses(ids: list[Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt\[1\] must be a token id from 0 to 49151"):
        smollm2().validate_ids([0, *ids], "prompt")


def test_validate_ids_accepts_the_whole_vocabulary() -> None:
    smollm2().validate_ids(range(49_152))


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"]])
def test_decode_refuses_what_is_no_id(ids: list[Any]) -> None:
    with pytest.raises(InvalidRequestError, match="token id"):
        smollm2().decode(ids)


def test_decode_ignores_ids_without_a_token() -> None:
    assert smollm2().decode([28120, 200_000, 905]) == smollm2().decode([28120, 905])


def test_decode_token_keeps_spaces_and_shows_incomplete_bytes() -> None:
    llama = Tokenizer(llama2_like())
    assert llama.decode_token(llama.encode("the", add_special_tokens=False)[0]) == " the"
    assert llama.decode_token(3 + 0xE6) == "\ufffd"
    assert llama.decode_token(1) == "<s>"
    gpt2 = Tokenizer(gpt2_like())
    assert gpt2.decode_token(gpt2.encode("é")[0]) == "\ufffd"
    assert gpt2.decode_token(10**6) == ""


def test_bad_words_with_and_without_a_space() -> None:
    tokenizer = smollm2()
    bare, spaced = tokenizer.bad_words_ids(["hello"])
    assert tokenizer.decode(bare) == "hello"
    assert tokenizer.decode(spaced) == " hello"
    assert tokenizer.bad_words_ids([" hello"]) == [bare, spaced]
    # After a space, digits are still the same token, after one of their own: nothing new to forbid.
    assert tokenizer.bad_words_ids(["7"]) == [tokenizer.encode("7")]
    with pytest.raises(InvalidRequestError, match="no tokens"):
        tokenizer.bad_words_ids(["  "])
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.bad_words_ids(["\ud800"])


# Directories


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    llama2_like().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )


def test_tokenizer_json_alone(directory: Path) -> None:
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.bos_token_id is None and tokenizer.eos_token_ids == frozenset()
    assert tokenizer.chat_template() is None


@pytest.mark.parametrize("eos", ["</s>", {"__type": "AddedToken", "content": "</s>", "lstrip": False}])
def test_special_tokens_in_either_form(directory: Path, eos: object) -> None:
    write(directory, "tokenizer_config.json", {"eos_token": eos, "add_bos_token": True, "pad_token": None})
    write(directory, "special_tokens_map.json", {"bos_token": {"content": "<s>"}, "eos_token": "<unk>"})
    tokenizer = Tokenizer.from_dir(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_tokens_that_only_the_configuration_knows(directory: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eot>",
        "additional_special_tokens": ["<tool>", {"__type": "AddedToken", "content": "<extra>"}],
        "added_tokens_decoder": {"9999": {"content": "<plain>", "special": False, "normalized": False}},
    }
    write(directory, "tokenizer_config.json", config)
    tokenizer, reference = Tokenizer.from_dir(directory), AutoTokenizer.from_pretrained(directory)
    text = "the<plain> a<eot><tool><extra>"
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.vocab_size == len(reference)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 9}, {2, 5, 7}),
        ({"eos_token_id": 5}, {}, {2, 5}),
        ({}, {"eos_token_id": [9, 10]}, {2, 9, 10}),
        ({}, {"text_config": {"eos_token_id": 11}}, {2, 11}),
        (None, None, {2}),
    ],
)
def test_end_tokens_of_the_generation_configuration(
    directory: Path, generation: object, config: object, expected: set[int]
) -> None:
    write(directory, "tokenizer_config.json", {"eos_token": "</s>"})
    if generation is not None:
        write(directory, "generation_config.json", generation)
        write(directory, "config.json", config)
    assert Tokenizer.from_dir(directory).eos_token_ids == expected


def test_chat_templates_by_name_and_from_files(directory: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write(directory, "tokenizer_config.json", {"chat_template": named})
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.chat_template() == "D" and tokenizer.chat_template(with_tools=True) == "T"
    write(directory, "chat_template.jinja", "F")
    (directory / "additional_chat_templates").mkdir()
    write(directory, "additional_chat_templates/rag.jinja", "R")
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.chat_templates == {"default": "F", "tool_use": "T", "rag": "R"}


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = llama2_like()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).encode("a" * 20) == Tokenizer(llama2_like()).encode("a" * 20)


def test_without_tokenizer_json_transformers_converts(tmp_path: Path) -> None:
    alphabet = gpt2_like().get_vocab()
    write(tmp_path, "vocab.json", alphabet)
    write(tmp_path, "merges.txt", "#version: 0.2\n")
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"})
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hé日")) == "hé日"
    assert tokenizer.eos_token_id == alphabet["<|end|>"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("generation_config.json", "\x00"),
    ],
)
def test_broken_files_are_named(directory: Path, name: str, content: str) -> None:
    write(directory, name, content)
    with pytest.raises(ModelLoadError, match=name):
        Tokenizer.from_dir(directory)


def test_missing_directories_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_the_default_models_files_suffice_without_the_configuration(tmp_path: Path) -> None:
    shutil.copy(ensure_default_model() / "tokenizer.json", tmp_path)
    assert Tokenizer.from_dir(tmp_path).encode("Hello") == smollm2().encode("Hello")
