"""Tokenizers: a byte-level BPE trained on a corpus, or one that is given, as a file or by its name on the hub."""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from datamodules.sentencepiece_model import convert

FILE_NAME, MODEL_NAME = "tokenizer.json", "tokenizer.model"
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
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a tokenizer.json, or a folder that holds one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
    end_of_text_id(tokenizer)
    return _for_documents(tokenizer)


def save_tokenizer(given: str | Path, path: Path) -> None:
    """Write the tokenizer that `given` names to `path`, as a tokenizer.json.

    Args:
        given: a tokenizer.json, which is copied byte by byte; a SentencePiece .model of the LLaMA kind, which is
            converted; a folder that holds one of them; or the name of a repository of the Hugging Face hub that does.
        path: where to.

    Raises:
        FileNotFoundError: nothing there, here or on the hub.
        ValueError: not a tokenizer, none with an end of text, or a .model of another kind.
    """
    file = _local_file(given) or _from_hub(str(given))
    if file.suffix == ".model":
        path.write_text(convert(file).to_str(pretty=True))
    else:
        shutil.copyfile(file, path)
    load_tokenizer(path)


def describe_tokenizer(given: str | Path) -> str:
    """What tells a tokenizer from another: the fingerprint of its file, or its name on the hub."""
    file = _local_file(given)
    return str(given) if file is None else fingerprint(file)


def _local_file(given: str | Path) -> Path | None:
    """The file that `given` is or holds; None if it can only be a name on the hub."""
    path = Path(given)
    if path.is_dir():
        for name in (FILE_NAME, MODEL_NAME):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path} holds no {FILE_NAME} and no {MODEL_NAME}")
    if path.is_file():
        return path
    if path.suffix in (".json", ".model") or str(given).count("/") > 1:
        raise FileNotFoundError(f"{path} does not exist: give a {FILE_NAME}, a .model, a folder or a name on the hub")
    return None


def _from_hub(name: str) -> Path:
    """The tokenizer's file of a repository, from the cache if it was asked for before."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(name, FILE_NAME))
        except RemoteEntryNotFoundError:
            return Path(hf_hub_download(name, MODEL_NAME))
    except Exception as error:  # the library raises a dozen kinds
        raise FileNotFoundError(
            f"{name} is neither a file here nor a repository of the hub with {FILE_NAME} or {MODEL_NAME} that can be"
            f" reached: check the name and the network ({str(error).splitlines()[0]})"
        ) from error


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
