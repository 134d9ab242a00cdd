"""Can it learn facts? The teacher reads an article and an answer about 20 unknown entities.

The paper (strict / lenient / other questions on the same facts, "OOD"): base 0/0/0, SFT 80/95/80,
SDFT 89/100/98, base with the article in its prompt 91/100/100.

    python -m experiments.knowledge --seeds 5

Training asks `?Acj=`, the attributes of cj and their sum. Strict: all of the answer is correct;
lenient: the sum is. OOD asks `?Bcj=`, for the difference, which is never trained on. "known" are
the 60 entities of pretraining, on both questions. The settings are chosen from the grid by a
second run on 20 other entities ("val strict", "val known").
"""

from data import toy
from experiments import runner
from experiments.common import base, train
from experiments.settings import grid
from train_toy import evaluate, sdft_step, sft_step

FAMILIES = {
    "sft": dict(step=sft_step),
    "sdft": dict(step=sdft_step),
    "sdft forward": dict(step=sdft_step, divergence="forward"),
}
ARMS = {"base": {}, "oracle": dict(read="article")}
ARMS |= {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
COLUMNS = ["strict", "lenient", "OOD", "known", "val strict", "val known"]
WORLDS = [("facts",)]


def measure(seed, settings=None, read=None):
    metrics = facts_metrics(base(seed, "facts"), seed, settings, read=read)
    if settings:
        other = facts_metrics(base(seed, "facts"), seed, settings, part="val")
        metrics |= {"val strict": other["strict"], "val known": other["known"]}
    return metrics


def facts_metrics(student, seed, settings=None, part="new", teacher_reads="both", read=None):
    """Train a copy of the student on one part of the facts, then ask it everything.

    `teacher_reads` is the text in the teacher's prompt, `read` one in the prompts when asked.
    """
    if settings:
        data = toy.facts(part, seed, reads=teacher_reads)
        student, _ = train(student, data, seed, **settings)
    asked = {"A": (part, "A"), "OOD": (part, "B"), "known A": ("known", "A")}
    asked["known B"] = ("known", "B")
    sets = {
        name: toy.facts(p, seed, question, read or "both") for name, (p, question) in asked.items()
    }
    prompts = "teacher_prompts" if read else "prompts"
    strict, length = evaluate(student, sets, prompts, temperature=1.0)
    lenient, _ = evaluate(student, sets, prompts, temperature=1.0, is_correct=toy.is_last_correct)
    return {
        "strict": strict["A"],
        "lenient": lenient["A"],
        "OOD": strict["OOD"],
        "known": (strict["known A"] + strict["known B"]) / 2,
        "length": length["A"],
    }


if __name__ == "__main__":
    runner.main("knowledge")
