"""Turns at a terminal: one text, of which nothing is read twice, stopped by Ctrl-C and left by Ctrl-D."""

import io
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from datamodules.tokenizer import load_tokenizer
from rat import CausalLM
from rat.generation import Sampling
from rat.session import Session
from rat_cli.conversation import Conversation, encoded

Cli = Callable[..., Any]
COUNT = 6


@pytest.fixture
def conversation(saved: Path) -> Conversation:
    """Greedy, six tokens an answer."""
    model = CausalLM.from_pretrained(saved)
    return Conversation(Session(model), load_tokenizer(saved), Sampling(), COUNT, None, torch.Generator())


def continued(conversation: Conversation, tokens: list[int], count: int = COUNT) -> list[int]:
    """The text and its greedy continuation, by a model that reads all of it at once."""
    model = conversation.session.model
    return tokens + model.generate([tokens], max_new_tokens=count)[0]


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_turns_are_one_text(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = conversation.vocabulary
    type_in(monkeypatch, "\nsome words\n\nmore\n")
    conversation.converse()
    first = continued(conversation, encoded(vocabulary, "some words"))
    second = continued(conversation, first)
    third = continued(conversation, second + encoded(vocabulary, "\nmore", behind=True))
    assert conversation.session.tokens == third
    shown = capsys.readouterr()
    assert shown.out == "".join(
        vocabulary.decode(text[-COUNT:]).rstrip("\N{REPLACEMENT CHARACTER}") + "\n" for text in (first, second, third)
    )
    assert shown.err == ""


def test_ctrl_c_stops_the_answer_and_the_text_goes_on(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = conversation.session.model, 0
    step = model.step

    def interrupted(*inputs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return step(*inputs)

    type_in(monkeypatch, "some words\nmore\n")
    with monkeypatch.context() as patch:
        patch.setattr(model, "step", interrupted)
        before = signal.getsignal(signal.SIGINT)
        conversation.converse()
        assert signal.getsignal(signal.SIGINT) == before
    first = continued(conversation, encoded(conversation.vocabulary, "some words"), count=3)
    more = encoded(conversation.vocabulary, "\nmore", behind=True)
    assert conversation.session.tokens == continued(conversation, first + more)


def test_a_second_ctrl_c_interrupts(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    step = conversation.session.model.step

    def interrupted(*inputs: Any) -> torch.Tensor:
        for _ in range(2):
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return step(*inputs)

    monkeypatch.setattr(conversation.session.model, "step", interrupted)
    type_in(monkeypatch, "some words\n")
    with pytest.raises(KeyboardInterrupt):
        conversation.converse()


def test_a_terminal_is_told_the_keys_and_drops_a_line_at_ctrl_c(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Iterator[str | type[BaseException]] = iter(["words", KeyboardInterrupt, "more", EOFError])
    asked = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    type_in(monkeypatch, "")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    conversation.converse()
    assert asked == ["> "] * 4
    assert "Ctrl-C stops an answer, an empty line goes on with it, Ctrl-D leaves" in capsys.readouterr().err
    first = continued(conversation, encoded(conversation.vocabulary, "words"))
    more = encoded(conversation.vocabulary, "\nmore", behind=True)
    assert conversation.session.tokens == continued(conversation, first + more)


def test_generate_starts_with_a_prompt_and_keeps_the_state(
    cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversation: Conversation
) -> None:
    type_in(monkeypatch, "more\n")
    greedy = ["--temperature", "0", "--max_new_tokens", str(COUNT), "--stop_at_end_of_text", "false"]
    options = ["--checkpoint", saved, *greedy, "--interactive", "--save_state", tmp_path / "state"]
    result = cli("generate", *options, "--prompt", "some words")
    assert result.code == 0, result.err
    first = continued(conversation, encoded(conversation.vocabulary, "some words"))
    second = continued(conversation, first + encoded(conversation.vocabulary, "\nmore", behind=True))
    assert Session.load(tmp_path / "state", conversation.session.model).tokens == second
    assert result.out.startswith("some words")
    type_in(monkeypatch, "")
    result = cli("generate", *options, "--load_state", tmp_path / "state")
    assert (result.code, result.out) == (0, "")
    assert f"{len(second)} tokens and their state: {tmp_path / 'state'}" in result.err


def test_an_answer_is_shown_as_it_stands_behind_the_text(
    conversation: Conversation, llama: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation.vocabulary = llama
    space = llama.token_to_id("\u2581words")
    conversation.session.write = lambda *_: iter([space])  # type: ignore[method-assign]
    conversation.say("some")
    conversation.answer()
    assert capsys.readouterr().out == " words\n"


def test_text_behind_text_gets_no_space_of_its_own(llama: Tokenizer) -> None:
    tokens = encoded(llama, "some") + encoded(llama, "\nwords", behind=True)
    assert llama.decode(tokens) == "some\nwords"
    assert llama.decode(encoded(llama, "some") + encoded(llama, "words")) == "some words"
