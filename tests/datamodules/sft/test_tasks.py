from typing import Any

import pytest

from datamodules.sft.tasks import Example, Row, find_task
from datamodules.text_sources import SourceError

SHORT: Row = {"document": {"summary": {"text": "t"}}, "question": {"text": "q"}}


def examples(task: Any, row: Any, **options: Any) -> list[tuple[str, str, list[str]]]:
    return [tuple(example) for example in find_task(task, **options).examples(row)]


@pytest.mark.parametrize(
    ("setting", "context"),
    [
        (None, "A short story."),
        ("summary", "A short story."),
        ("text", "The whole story."),
        ("full", "A short story.\n\nThe whole story."),
    ],
)
def test_narrativeqa(hub_rows: dict[str, Row], setting: Any, context: str) -> None:
    assert examples("narrativeqa", hub_rows["narrativeqa"], setting=setting) == [(context, "Who?", ["Ann", "Ann B."])]


@pytest.mark.parametrize("gap", ["\n", "\n\n"])
def test_qmsum_as_scrolls_has_it(hub_rows: dict[str, Row], gap: str) -> None:
    row = {**hub_rows["qmsum"], "input": f"Who came?{gap}PM: Hello .\nUI: Hi ."}
    assert examples("qmsum", row) == [("PM: Hello .\nUI: Hi .", "Who came?", ["Two."])]


def test_qmsum_as_published(meeting: Row) -> None:
    transcript = "PM: Hello .\nUI: Hi ."
    assert examples("qmsum", meeting) == [
        (transcript, "Summarize it.", ["They met."]),
        (transcript, "Who came?", ["Two."]),
    ]


def test_wikisum(hub_rows: dict[str, Row]) -> None:
    assert examples("wikisum", hub_rows["wikisum"]) == [("Find a chair.", "How to sit", ["Sit down."])]


def test_rows_of_ones_own() -> None:
    row = {"context": "c", "input": "i", "answer": "a"}
    assert examples("jsonl", row) == [("c", "i", ["a"])]
    assert examples("jsonl", row | {"answers": ["b", "d\ud800"]}) == [("c", "i", ["b", "d?"])]


@pytest.mark.parametrize(
    ("task", "kind", "tokens", "hub", "test"),
    [
        ("narrativeqa", "Story", 128, "deepmind/narrativeqa", "test"),
        ("qmsum", "Transcript", 384, "pszemraj/qmsum-cleaned", "validation"),
        ("wikisum", "Article", 256, "d0rj/wikisum", "test"),
        ("jsonl", "Context", 128, None, "test"),
    ],
)
def test_prompts(task: Any, kind: str, tokens: int, hub: str | None, test: str) -> None:
    found = find_task(task)
    assert (found.max_new_tokens, found.hub, found.hub_test_split) == (tokens, hub, test)
    assert found.prompt(Example("It was.", "Was it?", ["Yes"])) == f"{kind}: It was.\n\nQuestion: Was it?\n\nAnswer:"


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("narrativeqa", {"document": {"text": "t"}}, "no column 'document.summary.text': 'summary' is not in 'text'"),
        ("narrativeqa", {**SHORT, "answers": "Ann"}, "'answers' must be a list, got 'Ann'"),
        ("narrativeqa", {**SHORT, "answers": ["Ann"]}, "no column 'text': 'text' is not in 'Ann'"),
        ("qmsum", {"question": "q"}, "no column 'input': 'input' is not in 'question'"),
        ("qmsum", {"meeting_transcripts": [{"content": "c"}]}, "no column 'speaker': 'speaker' is not in 'content'"),
        ("wikisum", {"title": "t", "text": "t"}, "no column 'article': 'article' is not in 'title', 'text'"),
        ("jsonl", {"context": "c", "input": "i"}, "no column 'answer'"),
        ("jsonl", {"context": 3, "input": "i", "answer": "a"}, "'context' must be text, got 3"),
        ("jsonl", {"context": "c", "input": "i", "answers": [1]}, "'answers' must be text, got 1"),
    ],
)
def test_what_a_row_lacks_is_named(task: Any, row: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        examples(task, row)


def test_only_narrativeqa_has_settings() -> None:
    with pytest.raises(ValueError, match="setting=text is one of narrativeqa, and the task is qmsum"):
        find_task("qmsum", "text")
