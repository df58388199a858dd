"""Small tokenizers of every decoder family, built in memory."""

from functools import cache

from charonia.entrypoints.default_model import ensure_default_model
from charonia.text import Tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

LETTERS = "abcdefghijklmnopqrstuvwxyzé,.!\n日本"
PIECES = ("▁the", "▁a", "▁▁", "ing", "the", "▁.")


@cache
def smollm2() -> Tokenizer:
    """The default model's own tokenizer (ByteLevel)."""
    return Tokenizer.from_dir(ensure_default_model())


def byte_tokens(text: str) -> list[str]:
    """The byte-fallback tokens that spell `text`."""
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def _sentencepiece_vocab() -> dict[str, int]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS, *PIECES]
    return {token: i for i, token in enumerate(tokens)}


def _sentencepiece(**options: bool) -> Backend:
    vocab = _sentencepiece_vocab()
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a")]
    for piece in ("th",):
        vocab[piece] = len(vocab)
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, **options))
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<pad>", normalized=False)])
    return backend


def _add_bos(backend: Backend) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )


def llama2_like() -> Backend:
    """Byte fallback; one space is dropped where the text begins."""
    backend = _sentencepiece(byte_fallback=True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_bos(backend)
    return backend


def gemma_like() -> Backend:
    """Byte fallback; no space is dropped."""
    backend = _sentencepiece(byte_fallback=True)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_bos(backend)
    return backend


def metaspace_like() -> Backend:
    """Metaspace without byte fallback; the first token loses its spaces."""
    backend = _sentencepiece()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def gpt2_like() -> Backend:
    """ByteLevel, single bytes only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<tool 日本>", normalized=False), AddedToken("Ġab", normalized=False)])
    return backend


def word_level() -> Backend:
    """No decoder: tokens are joined by spaces."""
    backend = Backend(models.WordLevel({"[unk]": 0, "one": 1, "two": 2, "three": 3}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[end]", "[pad]"])
    return backend


def word_piece() -> Backend:
    """WordPiece: the text of a token depends on whether it comes first."""
    words = ["[unk]", "play", "##ing", "##ed", "a", ",", "##s"]
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[end]"])
    return backend


def suffixed() -> Backend:
    """BPE with an end-of-word suffix, which becomes a space except at the end of the text."""
    words = ["<unk>", "hel", "lo</w>", "you</w>", "a</w>", "b"]
    backend = Backend(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "removed")
    backend.decoder = decoders.BPEDecoder()
    backend.add_special_tokens(["<end>"])
    return backend


BY_TOKEN = {
    "llama2": llama2_like,
    "gemma": gemma_like,
    "metaspace": metaspace_like,
    "gpt2": gpt2_like,
}
"""Families that decode token by token."""
BY_CONTEXT = {"word_level": word_level, "word_piece": word_piece, "suffixed": suffixed}
"""Families whose decoder looks at neighbours."""
