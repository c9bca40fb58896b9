"""Text to token ids and back: tokenizers, detokenising, chat templates, stop strings. Imports no torch."""

from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.detokenize import IncrementalDetokenizer
from lightllmd.text.ids import IdTokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.stop import StopList, StopMatcher
from lightllmd.text.tokenizer import ByteTokenizer, load_tokenizer, open_tokenizer

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "IdTokenizer",
    "IncrementalDetokenizer",
    "StopList",
    "StopMatcher",
    "Tokenizer",
    "load_tokenizer",
    "open_tokenizer",
]
