"""SentencePiece models of the LLaMA kind as tokenizers of the `tokenizers` library, with the same ids for every text.

SentencePiece puts a space before the text, writes spaces as U+2581 and then, of all neighbours whose union is a piece,
merges those of the best score, the leftmost first. The library merges by the rank of a pair; with the pairs in the
order of their union's score that is the same. What no piece covers becomes its bytes.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

_SPACE = "\u2581"
# ModelProto.SentencePiece.Type and TrainerSpec.ModelType of SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE, _BPE = 1, 2, 3, 6, 2
_KINDS = {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}


def convert(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece `.model` file.

    Raises:
        ValueError: not such a file, or a model of another kind than LLaMA's: not a BPE with bytes to fall back on, or
            one that normalises the text.
    """
    model = _read(path)
    _check(model, path)
    pieces = {piece.piece: number for number, piece in enumerate(model.pieces)}
    unknown = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
    bpe = models.BPE(pieces, _merges(model, pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    ends: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        spaces.insert(0, normalizers.Prepend(_SPACE))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(ends)
    control = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return tokenizer


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise ValueError(f"{path} is no SentencePiece model: copy it again, or give a tokenizer.json")
    return model


def _check(model: Any, path: Path) -> None:
    trained, normal = model.trainer_spec, model.normalizer_spec
    wrong = {
        "is no BPE": trained.model_type != _BPE,
        "has no bytes to fall back on": not trained.byte_fallback,
        f"normalises text ({normal.name})": bool(normal.precompiled_charsmap),
        "removes spaces": normal.remove_extra_whitespaces,
        "does not escape spaces": not normal.escape_whitespaces,
        "puts spaces behind words": trained.treat_whitespace_as_suffix,
        "has symbols of the user's": not {piece.type for piece in model.pieces} <= _KINDS,
    }
    if reasons := [reason for reason, holds in wrong.items() if holds]:
        raise ValueError(f"{path} is no SentencePiece model of the LLaMA kind: it {', '.join(reasons)}")


def _merges(model: Any, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces whose union is a piece, the best union first."""
    found = []
    for piece in model.pieces:
        if piece.type == _NORMAL:
            cuts = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
            found += [(-piece.score, pair) for pair in cuts if pair[0] in pieces and pair[1] in pieces]
    return [pair for _, pair in sorted(found, key=lambda item: item[0])]
