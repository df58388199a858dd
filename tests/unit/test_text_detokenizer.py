"""Invariant: the deltas of a stream, joined, are the text decoded at once. The oracle is the tokenizers library."""

import random

import pytest
from charonia.text import IncrementalDetokenizer, Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_tokenizers import BY_CONTEXT, BY_TOKEN, byte_tokens, llama2_like, smollm2
from tokenizers import Tokenizer as Backend

FAMILIES = BY_TOKEN | BY_CONTEXT
BACKENDS = {name: build() for name, build in FAMILIES.items()}
TOKENIZERS = {name: Tokenizer(backend) for name, backend in BACKENDS.items()}


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in chunks of the given sizes, over and over."""
    chunks, begin, i = [], 0, 0
    while begin < len(ids):
        size = sizes[i % len(sizes)]
        chunks.append(ids[begin : begin + size])
        begin, i = begin + size, i + 1
    return chunks


def stream(tokenizer: Tokenizer, prompt: list[int], chunks: list[list[int]], **options: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, **options)
    return [*map(detokenizer.push, chunks), detokenizer.flush()]


def ids_of(backend: Backend, *tokens: str) -> list[int]:
    ids = [backend.token_to_id(token) for token in tokens]
    assert None not in ids
    return ids


@st.composite
def sequences(draw: st.DrawFn, name: str, max_size: int = 24) -> list[int]:
    """Ids whose runs of byte-fallback tokens are well-formed; everything else at random, unknown ids included."""
    backend = BACKENDS[name]
    size = backend.get_vocab_size()
    anything = st.integers(0, size + 3).map(lambda i: [i])
    if name in ("llama2", "gemma"):
        anything = anything.filter(lambda ids: not (3 <= ids[0] < 3 + 256))
        whole = st.characters(codec="utf-8").map(lambda char: ids_of(backend, *byte_tokens(char)))
        anything = st.one_of(anything, whole)
    return [i for part in draw(st.lists(anything, max_size=max_size)) for i in part]


CHUNK_SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_deltas_are_the_text_after_the_prompt(name: str, data: st.DataObject) -> None:
    backend, tokenizer = BACKENDS[name], TOKENIZERS[name]
    prompt, output = data.draw(sequences(name, 6)), data.draw(sequences(name))
    skip = data.draw(st.booleans())
    deltas = stream(tokenizer, prompt, cut(output, data.draw(CHUNK_SIZES)), skip_special_tokens=skip)
    if name == "gpt2":
        expected = backend.decode(output, skip_special_tokens=skip)
    else:
        before = backend.decode(prompt, skip_special_tokens=skip)
        expected = backend.decode(prompt + output, skip_special_tokens=skip)[len(before) :]
    assert "".join(deltas) == expected


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_decode_is_the_librarys(name: str, data: st.DataObject) -> None:
    ids, skip = data.draw(sequences(name)), data.draw(st.booleans())
    assert TOKENIZERS[name].decode(ids, skip) == BACKENDS[name].decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_without_spaces_between_special_tokens_streams_like_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(sequences(name))
    options = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    deltas = stream(tokenizer, [], cut(ids, data.draw(CHUNK_SIZES)), **options)
    assert "".join(deltas) == tokenizer.decode(ids, **options)


def test_spaces_between_special_tokens() -> None:
    tokenizer = TOKENIZERS["word_level"]
    ids = ids_of(BACKENDS["word_level"], "one", "[end]", "[pad]", "two")
    assert tokenizer.decode(ids, False, True) == "one [end] [pad] two"
    assert tokenizer.decode(ids, False, False) == "one [end][pad] two"
    assert tokenizer.decode(ids, True, False) == "one two"


@pytest.mark.parametrize("skip", [False, True])
def test_every_token_of_the_real_tokenizer(skip: bool) -> None:
    tokenizer = smollm2()
    backend = tokenizer._backend
    everything = list(range(tokenizer.vocab_size))
    random.Random(7).shuffle(everything)
    for chunks in (cut(everything, [1]), cut(everything, [1, 2, 7])):
        deltas = stream(tokenizer, [4000, 5000], chunks, skip_special_tokens=skip)
        assert "".join(deltas) == backend.decode(everything, skip_special_tokens=skip)
    for token_id in everything:
        assert "".join(stream(tokenizer, [], [[token_id]], skip_special_tokens=skip)) == backend.decode(
            [token_id], skip_special_tokens=skip
        )


@given(ids=st.lists(st.integers(0, 49_151), max_size=40), skip=st.booleans())
@settings(max_examples=100, deadline=None)
def test_random_sequences_of_the_real_tokenizer(ids: list[int], skip: bool) -> None:
    deltas = stream(smollm2(), [1], cut(ids, [1]), skip_special_tokens=skip)
    assert "".join(deltas) == smollm2()._backend.decode(ids, skip_special_tokens=skip)


@given(text=st.text(st.characters(codec="utf-8")))
@settings(max_examples=100, deadline=None)
def test_only_incomplete_characters_are_held_back(text: str) -> None:
    tokenizer = TOKENIZERS["gpt2"]
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    shown, data = "", b""
    ids = [tokenizer.encode(char, add_special_tokens=False) for char in text]
    for char, char_ids in zip(text, ids, strict=True):
        for token_id in char_ids:
            shown += detokenizer.push([token_id])
        data += char.encode()
        assert shown == data.decode()
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("name", ["llama2", "gemma"])
def test_ill_formed_bytes_do_not_spoil_their_run(name: str) -> None:
    """The library turns a whole run of byte tokens into U+FFFD if any of them is ill-formed."""
    backend, tokenizer = BACKENDS[name], TOKENIZERS[name]
    ids = ids_of(backend, "a", *byte_tokens("日"), "<0xE6>", "<0x97>")
    assert backend.decode(ids) == "a" + "\ufffd" * 5
    deltas = stream(tokenizer, [], cut(ids, [1]))
    assert deltas == ["a", "", "", "日", "", "", "\ufffd\ufffd"]
    assert tokenizer.decode(ids) == "".join(deltas)


def test_cut_short_within_a_character() -> None:
    """One U+FFFD a byte where the tokenizer falls back to bytes, one in all for ByteLevel: as transformers has it."""
    llama, gpt2 = BACKENDS["llama2"], BACKENDS["gpt2"]
    ids = ids_of(llama, "a", *byte_tokens("😀")[:3])
    assert "".join(stream(TOKENIZERS["llama2"], [], [ids])) == "a\ufffd\ufffd\ufffd" == llama.decode(ids)
    ids = gpt2.encode("a😀").ids[:-1]
    assert "".join(stream(TOKENIZERS["gpt2"], [], [ids])) == "a\ufffd" == gpt2.decode(ids)


@given(ids=st.lists(st.integers(0, 300), max_size=20), sizes=CHUNK_SIZES, skip=st.booleans())
@settings(max_examples=100, deadline=None)
def test_ill_formed_runs_stream_like_decode(ids: list[int], sizes: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS["llama2"]
    deltas = stream(tokenizer, [], cut(ids, sizes), skip_special_tokens=skip)
    assert "".join(deltas) == tokenizer.decode(ids, skip)


def test_leading_space_depends_on_what_precedes() -> None:
    backend, tokenizer = BACKENDS["llama2"], TOKENIZERS["llama2"]
    the, a, bos, comma = ids_of(backend, "▁the", "▁a", "<s>", ",")
    assert stream(tokenizer, [], [[the], [a]]) == ["the", " a", ""]
    assert stream(tokenizer, [bos], [[the], [a]]) == ["the", " a", ""]
    assert stream(tokenizer, [bos, comma], [[the], [a]]) == [" the", " a", ""]
    assert stream(tokenizer, [bos], [[the]], skip_special_tokens=False) == [" the", ""]


def test_prompt_that_ends_within_a_character_gives_nothing_to_the_output() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    ids = BACKENDS["gpt2"].encode("é").ids
    assert "".join(stream(tokenizer, ids[:1], [ids[1:]])) == "\ufffd"


def test_nul_is_text() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    assert "".join(stream(tokenizer, [], [tokenizer.encode("a\0b")])) == "a\0b"


def test_llama2_like_round_trip() -> None:
    tokenizer = Tokenizer(llama2_like())
    assert tokenizer.decode(tokenizer.encode("the a 😀 日本")) == "the a 😀 日本"
