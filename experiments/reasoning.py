"""Answer-only demonstrations: does a model that reasons keep reasoning?

The paper (accuracy / tokens per response): base 31.2 / 4612, SFT 23.5 / 3273, SDFT 43.7 / 4180.

    python -m experiments.reasoning --seeds 5

Skill X, whose answers are a reasoning step and a result; the demonstrations hold the result only, `i.`. An answer counts if it ends and its
last token is the right result, with or without reasoning. The settings are chosen from the grid on validation inputs.

Expect SFT to drop the reasoning (length 2 with the end token) and with it the accuracy, SDFT to keep it and learn.
"""

from data import toy
from experiments import runner
from experiments.common import base, skill, skill_metrics, train_on_skill, validation
from experiments.settings import grid
from train_toy import evaluate, sft

FAMILIES = {"sft": dict(method=sft, style="short"), "sdft": dict(method="sdft", style="short")}
ARMS = {"base": {}, "teacher": dict(read="teacher_prompts")} | {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
COLUMNS = ["new", "new greedy", "prior", "length", "val new", "val prior"]
WORLDS = [("skills",)]


def measure(seed, settings=None, read=None):
    student, right = base(seed), toy.is_right_at_last
    if read:
        accuracy, length = evaluate(student, {"X": skill("X", "test", seed, "short")}, read, temperature=1.0, is_right=right)
        return {"new": accuracy["X"], "length": length["X"]}
    student = train_on_skill(student, seed, settings)
    return skill_metrics(student, seed, is_right=right) | validation(student, seed, right)


if __name__ == "__main__":
    runner.main("reasoning")
