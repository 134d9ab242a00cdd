"""What must the teacher read to teach facts? The expert's answer, the article, or both.

The paper (knowledge, strict): answer only about 37, article only about 75, both 89.

    python -m experiments.context --seeds 5

The facts of experiments/knowledge.py, two rates for every text, the better by validation. For
`?cjA=` the article `eh` gives cj's attributes, the answer `b` their sum, both together `ehb`.
"teacher" is the base's accuracy when it reads that text.
"""

from data import toy
from experiments import runner, verdicts
from experiments.common import base
from experiments.knowledge import facts_metrics
from experiments.settings import MIDDLE, grid
from train_toy import evaluate, sdft_step

TEXTS = {"answer only": "answer", "article only": "article", "both": "both"}
ARMS = {
    arm: dict(text=TEXTS[arm.split(" at ")[0]], settings=settings)
    for arm, settings in grid({k: dict(step=sdft_step, rates=MIDDLE[1:]) for k in TEXTS}).items()
}
COLUMNS = ["strict", "lenient", "OOD", "known", "teacher"]
WORLDS = [("facts",)]
SWEEP = ("val strict", "val known")


def measure(seed, text, settings):
    start, sets = base(seed, "facts"), {"A": toy.facts("new", seed, reads=text)}
    metrics = {"teacher": evaluate(start, sets, "teacher_prompts")[0]["A"]}
    other = facts_metrics(start, seed, settings, "val", text)
    metrics |= {"val strict": other["strict"], "val known": other["known"]}
    return metrics | facts_metrics(start, seed, settings, teacher_reads=text)


def claims(at):
    answer, article, both = (at(arm, "strict") for arm in TEXTS)
    shown = " / ".join(map(runner.mean_and_spread, (answer, article, both)))
    yield (
        "the article teaches more than the answer (strict: answer / article / both)",
        "about 37 / about 75 / 89",
        shown,
        verdicts.more(article, answer),
    )
    yield (
        "article and answer teach more than the article (the same)",
        "about 37 / about 75 / 89",
        shown,
        verdicts.more(both, article),
    )


if __name__ == "__main__":
    runner.main("context")
