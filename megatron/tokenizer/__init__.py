"""Text to token ids: the tokenizers of GPT-NeoX by their names, and a fast byte-level path.

:func:`build_tokenizer` opens one; :func:`~megatron.tokenizer.train.train_byte_level_bpe`
makes one.  Importing this package loads no tokenizer library.
"""

from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import TOKENIZER_TYPES, build_tokenizer

__all__ = ["TOKENIZER_TYPES", "Tokenizer", "build_tokenizer"]
