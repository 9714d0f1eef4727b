"""Which tasks make up a table of the paper (arXiv 2507.04416), and which number of each stands in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that are reported together.

    Attributes:
        groups: tasks and the metric of each that counts, by what they have in common; the mean of a group
            is reported, and that of all tasks.
        at_lengths: whether the tasks make their prompts, at a length in tokens.
        cut_middle: whether prompts that are too long lose their middle, and the longest is what the model was trained
            on, if no other length is given.
        stop: ends answers, besides what the task itself names.
    """

    groups: dict[str, dict[str, str]]
    at_lengths: bool = False
    cut_middle: bool = False
    stop: tuple[str, ...] = ()

    @property
    def tasks(self) -> dict[str, str]:
        """Every task and the metric that counts."""
        return {task: metric for group in self.groups.values() for task, metric in group.items()}


def _longbench(*names: str) -> dict[str, str]:
    return {f"longbench_{name}": "score" for name in names}


_RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")

SUITES = {
    "commonsense": Suite(
        groups={
            "commonsense": {
                "arc_easy": "acc",
                "arc_challenge": "acc_norm",
                "hellaswag": "acc_norm",
                "lambada_openai": "acc",
                "piqa": "acc",
                "winogrande": "acc",
            }
        }
    ),
    # A model that was only pre-trained goes on with another question after its answer.
    "longbench": Suite(
        groups={
            "single-document QA": _longbench("narrativeqa", "qasper", "multifieldqa_en"),
            "multi-document QA": _longbench("hotpotqa", "2wikimqa", "musique"),
            "summarisation": _longbench("gov_report", "qmsum", "multi_news"),
            "few-shot": _longbench("trec", "triviaqa", "samsum"),
            "code": _longbench("lcc", "repobench-p"),
        },
        cut_middle=True,
        stop=("\nQuestion",),
    ),
    "ruler": Suite(groups={"ruler": dict.fromkeys(_RULER, "")}, at_lengths=True),
    # lm-eval has none of these: whoever evaluates hands them in
    "sft": Suite(
        groups={
            "sft NarrativeQA": {f"sft_narrativeqa_{setting}": "f1" for setting in ("summary", "text", "full")},
            "sft summaries": {"sft_qmsum": "rouge_l", "sft_wikisum": "rouge_l"},
        },
        cut_middle=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One task to run, and how.

    Attributes:
        task: its name in lm-eval, or among the caller's own.
        metric: the one that counts; empty: the task's first.
        length: tokens of prompt and answer, where the task makes them itself.
        suite: the suite that asked for it, if any.
    """

    task: str
    metric: str = ""
    length: int | None = None
    suite: Suite | None = None

    @property
    def name(self) -> str:
        """What tells it from other jobs."""
        return self.task if self.length is None else f"{self.task}@{self.length}"


def jobs_of(suites: Sequence[str], tasks: Sequence[str], lengths: Sequence[int]) -> list[Job]:
    """The jobs of suites and of single tasks, each once.

    Args:
        suites: names in `SUITES`.
        tasks: names of tasks.
        lengths: of the tasks that make their prompts.

    Raises:
        ValueError: no task, an unknown suite, or a length that is none.
    """
    if not suites and not tasks:
        raise ValueError(f"nothing to evaluate: give --suite {', '.join(SUITES)} or --task NAME")
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths must be at least 1 token, got {list(lengths)}")
    jobs: dict[str, Job] = {}
    for name in suites:
        if name not in SUITES:
            close = get_close_matches(name, SUITES, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ":"
            raise ValueError(f"there is no suite {name!r}{hint} choose from {', '.join(SUITES)}")
        suite = SUITES[name]
        for task, metric in suite.tasks.items():
            for length in lengths if suite.at_lengths else [None]:
                job = Job(task=task, metric=metric, length=length, suite=suite)
                jobs.setdefault(job.name, job)
    for task in tasks:
        made = task in SUITES["ruler"].tasks or task.startswith(("niah_", "ruler_"))
        for length in lengths if made else [None]:
            job = Job(task=task, length=length, suite=SUITES["ruler"] if made else None)
            jobs.setdefault(job.name, job)
    return list(jobs.values())
