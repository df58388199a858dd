"""Everything between text and token ids: tokenizer, detokenizer, stop strings, chat templates. Never imports
torch.
"""

from charonia.text.chat import render_chat
from charonia.text.detokenizer import IncrementalDetokenizer
from charonia.text.output_processor import SequenceProcessor, convert_logprobs
from charonia.text.stop import StopChecker, StopMatch
from charonia.text.tokenizer import Tokenizer

__all__ = [
    "IncrementalDetokenizer",
    "SequenceProcessor",
    "StopChecker",
    "StopMatch",
    "Tokenizer",
    "convert_logprobs",
    "render_chat",
]
