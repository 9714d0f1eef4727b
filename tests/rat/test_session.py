"""Sessions: turns, forks and files give what one text would, reading every token once; other models are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rat import CausalLM
from rat.generation import Sampling
from rat.session import Session, model_identity

PATTERNS = [("rat", "sliding_window"), ("attention", "rnn")]
GREEDY = Sampling(repetition_penalty=1.3)
FIRST, SECOND = [5, 6, 7, 1, 2, 3, 9, 8], [30, 31]


@pytest.fixture(params=PATTERNS, ids="-".join)
def model(request: pytest.FixtureRequest, make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model(*request.param)


def watch(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of every step of `model` from now on."""
    read: list[list[int]] = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda ids, *rest: (read.append(ids.flatten().tolist()), step(ids, *rest))[1])
    return read


def test_turns_equal_one_text_and_read_every_token_once(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(FIRST)
    for more in ([], SECOND):
        expected += more
        expected += model.generate([expected], max_new_tokens=6, repetition_penalty=1.3)[0]
    read = watch(model, monkeypatch)
    session = Session(model)
    session.add(FIRST)
    first = list(session.write(6, GREEDY))
    session.add(SECOND)
    second = list(session.write(6, GREEDY))
    assert FIRST + first + SECOND + second == session.tokens == expected
    assert [token for step in read for token in step] == expected[:-1]


def test_an_answer_that_is_stopped_in_the_middle_is_gone_on_with(model: CausalLM) -> None:
    (expected,) = model.generate([FIRST], max_new_tokens=7, repetition_penalty=1.3)
    session = Session(model)
    session.add(FIRST)
    for _ in session.write(7, GREEDY):
        if len(session.tokens) == len(FIRST) + 3:
            break
    assert session.tokens[-1] == expected[2]
    assert [*session.tokens[len(FIRST) :], *session.write(4, GREEDY)] == expected


def test_an_end_of_text_ends_the_answer_and_is_no_part_of_the_text(model: CausalLM) -> None:
    (free,) = model.generate([FIRST], max_new_tokens=8, repetition_penalty=1.3)
    end = next(i for i in range(1, 8) if free[i] not in free[:i])
    session = Session(model)
    session.add(FIRST)
    assert list(session.write(8, GREEDY, eos_token_id=free[end])) == free[:end]
    assert session.tokens == FIRST + free[:end]
    assert list(session.write(8, GREEDY, eos_token_id=free[end])) == []
    assert list(session.write(8 - end, GREEDY)) == free[end:]


def test_draws_follow_the_seed(model: CausalLM) -> None:
    setting = {"temperature": 1.0, "top_p": 0.9}
    draw = torch.Generator()
    (expected,) = model.generate([FIRST], max_new_tokens=9, generator=draw.manual_seed(4), **setting)
    for seed, same in ((4, True), (5, False)):
        session = Session(model)
        session.add(FIRST)
        found = list(session.write(9, Sampling(**setting), generator=draw.manual_seed(seed)))
        assert (found == expected) == same


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_many_prompts_follow_one_past_that_stays_as_it_is(model: CausalLM, penalty: float) -> None:
    prompts = [[1], [2, 3, 4], [9, 9]]
    options: dict[str, Any] = {"max_new_tokens": 6, "repetition_penalty": penalty}
    expected = [model.generate([FIRST + prompt], **options)[0] for prompt in prompts]
    session = Session(model)
    session.add(FIRST)
    session.read()
    for _ in range(2):
        assert model.generate(prompts, past=session, **options) == expected
    assert session.tokens == FIRST


def test_a_file_goes_on_where_the_session_was(model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(model)
    session.add(FIRST)
    list(session.write(5, GREEDY))
    session.save(tmp_path / "new" / "state")
    expected = list(session.write(5, GREEDY))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]
    read = watch(model, monkeypatch)
    loaded = Session.load(tmp_path / "new" / "state", model)
    assert loaded.tokens == session.tokens[:13]
    assert list(loaded.write(5, GREEDY)) == expected
    read.clear()
    loaded = Session.load(tmp_path / "new" / "state", model)
    loaded.add(SECOND)
    loaded.read()
    assert read == [SECOND]


def test_what_was_not_read_yet_is_read_before_it_is_saved(model: CausalLM, tmp_path: Path) -> None:
    (expected,) = model.generate([FIRST], max_new_tokens=4)
    session = Session(model)
    session.add(FIRST)
    session.save(tmp_path / "state")
    assert list(Session.load(tmp_path / "state", model).write(4, Sampling())) == expected


def test_what_cannot_be(model: CausalLM, tmp_path: Path) -> None:
    session = Session(model)
    with pytest.raises(ValueError, match="there is no text to save"):
        session.save(tmp_path / "state")
    with pytest.raises(ValueError, match="there is no text to continue"):
        next(session.write(1, Sampling()))
    with pytest.raises(ValueError, match="holds token 40, the vocabulary has 0 to 39"):
        session.add([1, 40])
    assert session.tokens == []
    session.add([1])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        next(session.write(-1, Sampling()))
    assert list(session.write(0, Sampling())) == []


def test_files_of_others_are_refused(model: CausalLM, make_model: Callable[..., CausalLM], tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match="there is no saved state"):
        Session.load(path, model)
    session = Session(model)
    session.add(FIRST)
    session.save(path)
    other = make_model("rat", chunk_size=8)
    with pytest.raises(ValueError, match=r"the state of another model \(pattern is .*; chunk_size is 4, not 8\)"):
        Session.load(path, other)
    changed = make_model(*model.config.pattern)
    changed.load_state_dict({name: x + 1e-3 * (name == "norm.weight") for name, x in model.state_dict().items()})
    with pytest.raises(
        ValueError, match=r"another model \(its weights are others\): read the text again with this one"
    ):
        Session.load(path, changed)
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is no saved state of this version of the code"):
        Session.load(path, model)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is no saved state, or damaged"):
        Session.load(path, model)


def test_the_identity_is_that_of_weights_and_architecture(make_model: Callable[..., CausalLM]) -> None:
    model = make_model("rat")
    assert model_identity(model) == model_identity(make_model("rat", max_seq_len=99))
    others = [make_model("rat", rope_base=None), make_model("rat", window_size=9), make_model("rat").bfloat16()]
    assert len({model_identity(one) for one in (model, *others)}) == 4
