"""Byte-level BPE tokenizers: trained on a corpus, or read from a tokenizer.json."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, one of them END_OF_TEXT; the same texts give the same
    one.

    Raises:
        ValueError: vocab_size has no room for the 256 bytes and the end of text.
    """
    if vocab_size <= _BYTES:
        raise ValueError(f"vocab_size={vocab_size} is too small: {_BYTES} bytes and an end of text must fit in")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _for_documents(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the prepared folder that holds one.

    Text that looks like a special token is encoded as the text it is.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a tokenizer, or none with an end of text.
    """
    path = tokenizer_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a tokenizer.json, or a folder that holds one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
    end_of_text_id(tokenizer)
    return _for_documents(tokenizer)


def tokenizer_file(path: str | Path) -> Path:
    """`path` itself, or the tokenizer.json of the folder it is."""
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document. Raises ValueError if there is none."""
    for name in _END_NAMES:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise ValueError(f"the tokenizer has no end-of-text token, none of {', '.join(_END_NAMES)}")


def fingerprint(path: str | Path) -> str:
    """The sha256 of a tokenizer.json, by which shards know their tokenizer."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _for_documents(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True
    return tokenizer
