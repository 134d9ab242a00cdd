"""Can it learn facts? 20 entities whose attributes the base does not know; the teacher reads an article and an answer.

The paper (strict / lenient / other questions on the same facts, "OOD"): base 0/0/0, SFT 80/95/80, SDFT 89/100/98, base with the
article in its prompt 91/100/100.

    python -m experiments.knowledge --seeds 5

Training asks `?Acj=`, the attributes of cj and their sum; strict: all of the answer is right; lenient: the sum is. OOD asks `?Bcj=`,
for the difference, which is never trained on. "known" are the 60 entities of pretraining, on both questions. The settings are chosen from
the grid by a second run on 20 other entities ("val strict", "val known").

Expect SFT to learn the answers but not the other question, and to lose the known facts; SDFT to answer both.
"""

from data import toy
from experiments import runner
from experiments.common import base, train
from experiments.settings import grid
from train_toy import evaluate, sft

FAMILIES = {"sft": dict(method=sft), "sdft": dict(method="sdft"), "sdft forward": dict(method="sdft", kl="forward")}
ARMS = {"base": {}, "oracle": dict(read="article")} | {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
COLUMNS = ["strict", "lenient", "OOD", "known", "val strict", "val known"]
WORLDS = [("facts",)]


def measure(seed, settings=None, read=None):
    metrics = facts_metrics(base(seed, "facts"), seed, settings, read=read)
    if settings:
        other = facts_metrics(base(seed, "facts"), seed, settings, part="val")
        metrics |= {"val strict": other["strict"], "val known": other["known"]}
    return metrics


def facts_metrics(student, seed, settings=None, part="new", teacher_reads="both", read=None):
    """Train a copy of the student on one part of the facts, then ask it everything; `read` is a text to have in its prompt."""
    if settings:
        student, _ = train(student, toy.facts(part, seed, reads=teacher_reads), seed, **settings)
    asked = {"A": (part, "A"), "OOD": (part, "B"), "known A": ("known", "A"), "known B": ("known", "B")}
    sets = {name: toy.facts(p, seed, question, read or "both") for name, (p, question) in asked.items()}
    prompts = "teacher_prompts" if read else "prompts"
    strict, length = evaluate(student, sets, prompts, temperature=1.0)
    lenient, _ = evaluate(student, sets, prompts, temperature=1.0, is_right=toy.is_right_at_last)
    known = (strict["known A"] + strict["known B"]) / 2
    return {"strict": strict["A"], "lenient": lenient["A"], "OOD": strict["OOD"], "known": known, "length": length["A"]}


if __name__ == "__main__":
    runner.main("knowledge")
