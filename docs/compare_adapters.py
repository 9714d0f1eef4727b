"""The second row of the table "Against lm-eval's own adapter" in docs/evaluation.md: one model, asked in two ways.

python docs/compare_adapters.py MODEL TASKS [DOCUMENTS]

MODEL: a folder of `CausalLM.save_pretrained`. TASKS: documents of the six commonsense tasks, as
`cli.py evaluate --data` takes them. DOCUMENTS of each task are asked, 50 by default.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rat
from datamodules.tokenizer import end_of_text_id, load_tokenizer
from rat.evaluation.harness import RatLM
from rat.evaluation.scoring import RatScorer
from rat.evaluation.suites import Job, jobs_of
from rat.evaluation.tasks import TaskLoader
from rat_cli.sft_tasks import SFT_TASKS


def answers(lm: object, loader: TaskLoader, jobs: list[Job], documents: int) -> dict[str, list[tuple[float, bool]]]:
    """Log-likelihood, and whether greedy decoding would write it, of every item of every task."""
    tasks = {job.task: loader.load(job) for job in jobs}
    found = evaluate(lm, {"tasks": tasks, "groups": {}, "group_map": {}}, limit=documents, bootstrap_iters=0)
    return {
        task: [tuple(item[0]) for sample in samples for item in sample["resps"]]
        for task, samples in found["samples"].items()
    }


def main(folder: Path, data: Path, documents: int) -> None:
    """Ask both, and print how far they are apart."""
    vocabulary = load_tokenizer(folder / "tokenizer.json")
    end = end_of_text_id(vocabulary)
    named = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=vocabulary.id_to_token(end))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = get_model("hf")(pretrained=model, tokenizer=named, batch_size=8, device="cpu")
    ours = RatLM(RatScorer(rat.CausalLM.from_pretrained(folder).eval()), vocabulary, end, 8)
    jobs, loader = jobs_of(["commonsense"], [], []), TaskLoader(data, vocabulary, SFT_TASKS)
    expected, found = (answers(lm, loader, jobs, documents) for lm in (theirs, ours))
    items = [(a, b) for task in expected for a, b in zip(expected[task], found[task], strict=True)]
    print(f"{len(items)} items")
    print(f"largest difference: {max(abs(a[0] - b[0]) for a, b in items):.2g} nats")
    print(f"largest log-likelihood: {min(a[0] for a, _ in items):.0f}")
    print(f"greedy differs: {sum(a[1] != b[1] for a, b in items)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 50)
