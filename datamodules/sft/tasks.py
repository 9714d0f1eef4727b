"""What a fine-tuning task is: where its rows come from, and the examples that a row holds.

Prompts, and the most tokens that are generated, are the paper's (arXiv 2507.04416).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from datamodules.text_sources import SourceError

TaskName = Literal["narrativeqa", "qmsum", "wikisum", "jsonl"]
Setting = Literal["summary", "text", "full"]
Row = Mapping[str, Any]


class Example(NamedTuple):
    """A question about a context. The first answer is trained on, all of them are references for evaluation."""

    context: str
    input: str
    answers: list[str]

    def lacks(self) -> str | None:
        """What it cannot do without and does not have: "context", "input" or "answer"."""
        parts = {"context": self.context, "input": self.input, "answer": "".join(self.answers)}
        return next((name for name, text in parts.items() if not text.strip()), None)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        kind: what the prompt calls the context.
        max_new_tokens: an answer is generated with at most so many tokens.
        examples: the examples of a row; raises SourceError where a column is missing.
        hub: the data set's name on the Hugging Face hub; None if there is none.
        hub_test_split: the hub's split to test on.
    """

    kind: str
    max_new_tokens: int
    examples: Callable[[Row], Iterator[Example]]
    hub: str | None = None
    hub_test_split: str = "test"

    def prompt(self, example: Example) -> str:
        """The text that the answer follows, after a space."""
        return f"{self.kind}: {example.context}\n\nQuestion: {example.input}\n\nAnswer:"


def find_task(name: TaskName, setting: Setting | None = None) -> Task:
    """The task called `name`; `setting` (default "summary") says what NarrativeQA's questions are asked about.

    Raises:
        ValueError: a setting for a task that has none.
    """
    if name == "narrativeqa":
        return Task(
            kind="Story",
            max_new_tokens=128,
            examples=partial(_narrativeqa, _NARRATIVEQA_CONTEXTS[setting or "summary"]),
            hub="deepmind/narrativeqa",
        )
    if setting is not None:
        raise ValueError(f"setting={setting} is one of narrativeqa, and the task is {name}: leave --setting out")
    return _TASKS[name]


_NARRATIVEQA_CONTEXTS: dict[Setting, tuple[str, ...]] = {
    "summary": ("document.summary.text",),
    "text": ("document.text",),
    "full": ("document.summary.text", "document.text"),
}


def _narrativeqa(contexts: tuple[str, ...], row: Row) -> Iterator[Example]:
    """A row of deepmind/narrativeqa: {document: {summary: {text}, text}, question: {text}, answers: [{text}]}."""
    context = "\n\n".join(_text(row, column) for column in contexts)
    answers = [_text(answer, "text") for answer in _list(row, "answers")]
    yield Example(context, _text(row, "question.text"), answers)


def _qmsum(row: Row) -> Iterator[Example]:
    """A row of QMSum as SCROLLS has it, or as it was published.

    SCROLLS and pszemraj/qmsum-cleaned: {input, output}, where the input is a line with the question, then the
    transcript. Published: a meeting {meeting_transcripts: [{speaker, content}], general_query_list and
    specific_query_list: [{query, answer}]}.
    """
    if "meeting_transcripts" not in row:
        question, _, transcript = _text(row, "input").partition("\n")
        yield Example(transcript.strip(), question.strip(), [_text(row, "output")])
        return
    turns = _list(row, "meeting_transcripts")
    transcript = "\n".join(f"{_text(turn, 'speaker')}: {_text(turn, 'content')}" for turn in turns)
    for queries in ("general_query_list", "specific_query_list"):
        for query in _list(row, queries):
            yield Example(transcript, _text(query, "query"), [_text(query, "answer")])


def _wikisum(row: Row) -> Iterator[Example]:
    """A row of d0rj/wikisum: {title, article, summary}; the title is the question."""
    yield Example(_text(row, "article"), _text(row, "title"), [_text(row, "summary")])


def _plain(row: Row) -> Iterator[Example]:
    """A row {context, input, answer} or {context, input, answers: [...]}."""
    if "answers" in row:
        answers = [_text({"answers": answer}, "answers") for answer in _list(row, "answers")]
    else:
        answers = [_text(row, "answer")]
    yield Example(_text(row, "context"), _text(row, "input"), answers)


_TASKS: dict[TaskName, Task] = {
    # SCROLLS keeps the answers of its test split to itself
    "qmsum": Task(
        kind="Transcript",
        max_new_tokens=384,
        examples=_qmsum,
        hub="pszemraj/qmsum-cleaned",
        hub_test_split="validation",
    ),
    "wikisum": Task(kind="Article", max_new_tokens=256, examples=_wikisum, hub="d0rj/wikisum"),
    "jsonl": Task(kind="Context", max_new_tokens=128, examples=_plain),
}


def _text(row: Row, column: str) -> str:
    """The text in a column (a path with dots); empty where the file has a null."""
    value = _value(row, column)
    if value is not None and not isinstance(value, str):
        raise SourceError(f"{column!r} must be text, got {value!r:.80}")
    # JSON can hold lone surrogates, which are no text
    return (value or "").encode(errors="replace").decode()


def _list(row: Row, column: str) -> list[Any]:
    """The list in a column; empty where the file has a null."""
    value = _value(row, column)
    if value is not None and not isinstance(value, list):
        raise SourceError(f"{column!r} must be a list, got {value!r:.80}")
    return value or []


def _value(row: Any, column: str) -> Any:
    for key in column.split("."):
        if not isinstance(row, Mapping) or key not in row:
            found = ", ".join(map(repr, row)) if isinstance(row, Mapping) else repr(row)
            raise SourceError(f"no column {column!r}: {key!r} is not in {found:.200}")
        row = row[key]
    return row
