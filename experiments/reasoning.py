"""Answer-only demonstrations: does a model that reasons keep reasoning?

    python -m experiments.reasoning --seeds 5

Skill X with prompts of 5 digits, whose answers are three reasoning steps and a result; the
demonstrations hold the result only, `i.`. An answer counts if it ends and its last token is the
correct result, with reasoning (5 tokens) or without (2). README.md, "Answer-only demonstrations".
"""

import numpy as np

from experiments import runner
from experiments.common import base, skill, skill_metrics, train_on_skill
from experiments.settings import HIGH, METHODS, MIDDLE, grid
from experiments.worlds import is_last_correct
from train_toy import evaluate


def measure(seed, settings=None, reads=None):
    start = base(seed, "long")
    if reads:
        test = skill("X", "test", seed, "short", world="long")
        accuracy, length = evaluate(start, {"X": test}, reads, is_correct=is_last_correct)
        return {"new": accuracy["X"], "length": length["X"]}
    student, _ = train_on_skill(start, seed, settings, world="long")
    return skill_metrics(student, start, seed, is_correct=is_last_correct, world="long")


def derive(metrics):
    metrics["base"][".95 of the length"] = 0.95 * np.array(metrics["base"]["length"])


RATES = {"sft": HIGH, "sdft": MIDDLE, "sdft, forward KL": MIDDLE}
SHORT = {name: METHODS[name] | dict(style="short") for name in RATES}
REASONING = runner.Experiment(
    name="reasoning",
    arms=[dict(arm="base"), dict(arm="teacher", reads="teacher_prompts"), *grid(RATES, SHORT)],
    measure=measure,
    columns=["new", "sampled", "prior", "length", "val new", "val prior"],
    bases=[dict(world="long")],
    choose_by=("val new", "val prior"),
    derive=derive,
)

if __name__ == "__main__":
    runner.main(__doc__, REASONING)
