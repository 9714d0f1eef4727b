import re
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors

from datamodules.synthetic import Needles, Sample
from datamodules.synthetic.words import SENTENCES
from datamodules.tokenizer import train_tokenizer

NEEDLE = re.compile(r"The special magic (word|number|uuid) for (\S+) is (\S+)\.")
QUESTION = re.compile(r"\nWhat (?:is|are) the special magic (?:word|number|uuid)s? for ([^?]*)\? The .* (?:is|are)$")
Decode = Callable[[list[int]], str]


def whole(sample: Sample, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """All T + 1 tokens, and which of them are asked for."""
    answers = np.append(False, sample.labels != -100)
    tokens = np.append(sample.input_ids, sample.labels[-1] if answers[-1] else eos_id)
    np.testing.assert_array_equal(tokens[answers], sample.labels[sample.labels != -100])
    return tokens, answers


def from_bytes(ids: list[int]) -> str:
    return bytes(ids).decode()


def split(sample: Sample, eos_id: int, decode: Decode = from_bytes) -> tuple[str, str]:
    """Prompt and answer, after a look at where they stand."""
    tokens, answers = whole(sample, eos_id)
    first, *_, last = np.flatnonzero(answers)
    assert answers[first : last + 1].all()
    assert (tokens[last:] == eos_id).all()
    assert eos_id not in tokens[:last]
    return decode(tokens[:first].tolist()), decode(tokens[first:last].tolist())


def said_at(sample: Sample) -> str:
    """What stands where the distances point, a space between two of the values."""
    (asking,) = np.nonzero(sample.distance)
    values = np.split(asking, np.flatnonzero(np.diff(asking) > 1) + 1)
    return " ".join(from_bytes(sample.input_ids[places - sample.distance[places]].tolist()) for places in values)


def solve(prompt: str, variant: str) -> str:
    """The answer, read from the text alone."""
    needles = NEEDLE.findall(prompt)
    (asked,) = QUESTION.findall(prompt)
    keys = asked.split(", ")
    found = [[value for _, key, value in needles if key == wanted] for wanted in keys]
    assert len(keys) == (1 if variant != "multi_query" else len(needles))
    assert all(len(values) == (len(needles) if variant == "multi_value" else 1) for values in found)
    return " " + ", ".join(value for values in found for value in values)


def noise(prompt: str) -> list[str]:
    """The text's pieces, in order: its sentences of noise, and '' for every needle."""
    pieces = NEEDLE.sub("", prompt.split("\n")[0])
    sentences = re.split(r"(?<=\.) +| {2,}|^ | $", pieces) if pieces.strip() else []
    return [sentence for sentence in sentences if sentence]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_answers_follow_from_the_text(data: st.DataObject) -> None:
    kinds = st.sampled_from(["words", "numbers", "uuids"])
    variant = data.draw(st.sampled_from(["single", "multi_key", "multi_value", "multi_query"]))
    task = Needles(
        variant=variant, num_needles=data.draw(st.integers(1, 5)), key_kind=data.draw(kinds),
        value_kind=data.draw(kinds),
        num_digits=data.draw(st.integers(1, 9)), depth=data.draw(st.none() | st.floats(0, 1)),
    )  # fmt: skip
    seq_len = task.min_seq_len + data.draw(st.integers(0, 300))
    sample = task.sample(data.draw(st.integers(0, 2**40)), "train", data.draw(st.integers(0, 999)), seq_len)
    assert len(sample.input_ids) == len(sample.labels) == seq_len
    prompt, answer = split(sample, 256)
    assert solve(prompt, variant) == answer
    needles = NEEDLE.findall(prompt)
    assert len(needles) == (1 if variant == "single" else task.num_needles)
    assert len({key for _, key, _ in needles}) == (1 if variant == "multi_value" else len(needles))
    assert len({value for _, _, value in needles}) == len(needles)
    assert {kind + "s" for kind, _, _ in needles} == {task.value_kind}
    for kind, names in ((task.key_kind, [k for _, k, _ in needles]), (task.value_kind, [v for _, _, v in needles])):
        for name in names:
            assert_is(kind, name, task.num_digits)
    assert all(sentence in SENTENCES for sentence in noise(prompt))
    assert (said_at(sample), sample.items) == (" ".join(answer[1:].split(", ")), len(needles))
    room = seq_len - len(prompt) - len(answer)
    assert 0 <= room <= max(map(len, SENTENCES)), "another sentence would have fitted"


def assert_is(kind: str, name: str, num_digits: int) -> None:
    if kind == "uuids":
        assert UUID(name).version == 4
    elif kind == "numbers":
        assert re.fullmatch(rf"[1-9]\d{{{num_digits - 1}}}", name)
    else:
        assert re.fullmatch(r"[a-z]{5}-[a-z]{5}", name)


@pytest.mark.parametrize("variant", ["single", "multi_key", "multi_value", "multi_query"])
def test_the_smallest_sequence_has_no_noise(variant: str) -> None:
    task = Needles(variant=variant, num_needles=3)
    prompt, answer = split(task.sample(0, "val", 0, task.min_seq_len), 256)
    assert noise(prompt) == []
    assert len(prompt) + len(answer) == task.min_seq_len
    with pytest.raises(ValueError, match=f"seq_len={task.min_seq_len - 1}: it needs at least {task.min_seq_len}"):
        task.sample(0, "val", 0, task.min_seq_len - 1)


def places(task: Needles, i: int) -> tuple[dict[str, list[int]], int]:
    """How many sentences of noise stand before the needles of each key, and how many there are."""
    prompt, _ = split(task.sample(0, "train", i, 1200), 256)
    found: dict[str, list[int]] = {}
    for match in NEEDLE.finditer(prompt):
        found.setdefault(match[2], []).append(len(noise(prompt[: match.start()])))
    return found, len(noise(prompt))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("variant", ["single", "multi_key", "multi_value", "multi_query"])
def test_the_needles_asked_for_stand_where_they_are_wanted(variant: str, depth: float) -> None:
    task, elsewhere = Needles(variant=variant, num_needles=3, depth=depth), 0
    for i in range(5):
        prompt, _ = split(task.sample(0, "train", i, 1200), 256)
        asked = QUESTION.findall(prompt)[0].split(", ")
        found, total = places(task, i)
        assert total > 10
        assert {place for key in asked for place in found[key]} == {round(depth * total)}
        elsewhere += sum(place != round(depth * total) for key in found.keys() - set(asked) for place in found[key])
    assert (elsewhere > 5) == (variant == "multi_key"), "distracting needles stand anywhere"


def test_without_a_depth_needles_stand_anywhere() -> None:
    shares = [
        place / total
        for i in range(60)
        for found, total in [places(Needles(variant="multi_value", num_needles=3), i)]
        for values in found.values()
        for place in values
    ]
    assert np.quantile(shares, [0.1, 0.5, 0.9]).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of merges that reach over words, dots and digits of the task's own text."""
    texts = [split(Needles().sample(9, "train", i, 900), 256)[0] for i in range(20)]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 400).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("variant", ["single", "multi_key", "multi_value", "multi_query"])
@pytest.mark.parametrize("seq_len", [None, 300])
def test_a_tokenizer_encodes_the_same_questions(tokenizer: Path, variant: str, seq_len: int | None) -> None:
    task = Needles(variant=variant, num_needles=3, tokenizer=tokenizer)
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert (task.vocab_size, task.eos_id) == (400, loaded.token_to_id("<|endoftext|>"))
    seq_len = seq_len or task.min_seq_len
    longest = max(len(loaded.encode(f" {sentence}").ids) for sentence in SENTENCES)
    for i in range(60):
        sample = task.sample(0, "train", i, seq_len)
        assert len(sample.input_ids) == seq_len
        prompt, answer = split(sample, task.eos_id, loaded.decode)
        assert solve(prompt, variant) == answer
        places = np.flatnonzero(sample.distance)
        said = sample.input_ids[places - sample.distance[places]]
        assert (said == sample.labels[places]).mean() > 0.8, "but where merges reach over a value's end"
        if seq_len == 300:
            assert seq_len - (sample.input_ids != task.eos_id).sum() < longest


@pytest.mark.parametrize("normalizer", [normalizers.Strip(), normalizers.Replace(". ", "")], ids=["longer", "shorter"])
def test_text_may_take_other_tokens_together_than_apart(normalizer: normalizers.Normalizer, tmp_path: Path) -> None:
    """Characters as tokens; every sentence takes one more behind another than alone, or two fewer. None is added."""
    characters = Tokenizer(models.BPE({chr(i): i for i in range(128)}, []))
    characters.normalizer = normalizer
    characters.add_special_tokens(["<|endoftext|>"])
    characters.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 128)]
    )
    characters.save(str(tmp_path / "tokenizer.json"))
    task = Needles(tokenizer=tmp_path)
    for i in range(20):
        tokens, answers = whole(task.sample(0, "train", i, 900), task.eos_id)
        first, *_, last = np.flatnonzero(answers)
        assert (tokens[first:last] != task.eos_id).all()
        assert 900 - last <= max(map(len, SENTENCES)), "another sentence would have fitted"
        assert answers.sum() == 1 + len(characters.encode(" 1234567", add_special_tokens=False).ids)


def test_a_tokenizer_is_known_by_its_content(tokenizer: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.json"
    moved.write_bytes((tokenizer / "tokenizer.json").read_bytes())
    assert Needles(tokenizer=moved).identity() == Needles(tokenizer=tokenizer).identity()
    other = tmp_path / "other.json"
    train_tokenizer(["other words"], 280).save(str(other))
    assert Needles(tokenizer=other).identity() != Needles(tokenizer=moved).identity()
    assert Needles(tokenizer=moved, depth=0.5).identity() != Needles(tokenizer=moved).identity()
    assert Needles(depth=0.5).identity() != Needles().identity() != Needles(tokenizer=moved).identity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_needles": 0}, "num_needles=0 must be at least 1"),
        ({"num_digits": 0}, "num_digits=0 must be at least 1"),
        ({"num_digits": 19}, "num_digits=19 must be at most 18"),
        ({"depth": 1.5}, "depth=1.5 must lie between 0 and 1"),
        (
            {"variant": "multi_value", "num_needles": 10, "num_digits": 1},
            "10 needles need different values, and there are only 9 numbers",
        ),
        (
            {"variant": "multi_key", "num_needles": 10, "num_digits": 1, "key_kind": "numbers", "value_kind": "words"},
            "10 needles need different keys, and there are only 9 numbers",
        ),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Needles(**options)  # type: ignore[arg-type]


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.json does not exist"):
        _ = Needles(tokenizer=tmp_path / "nowhere.json").vocab_size
