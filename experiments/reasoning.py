"""Answer-only demonstrations: does a model that reasons keep reasoning?

The paper (accuracy / tokens per response): base 31.2 / 4612, SFT 23.5 / 3273, SDFT 43.7 / 4180.

    python -m experiments.reasoning --seeds 5

Skill X, whose answers are a reasoning step and a result; the demonstrations hold the result only,
`i.`. An answer counts if it ends and its last token is the correct result, with or without
reasoning: with it, a response has 3 tokens, the end token included, without it 2. The settings are
chosen from the grid on validation inputs.
"""

from data import toy
from experiments import runner
from experiments.common import base, skill, skill_metrics, train_on_skill, validation
from experiments.settings import grid
from train_toy import evaluate, sdft_step, sft_step

FAMILIES = {"sft": dict(step=sft_step, style="short"), "sdft": dict(step=sdft_step, style="short")}
ARMS = {"base": {}, "teacher": dict(read="teacher_prompts")}
ARMS |= {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
COLUMNS = ["new", "new greedy", "prior", "length", "val new", "val prior"]
WORLDS = [("skills",)]


def measure(seed, settings=None, read=None):
    student, rule = base(seed), dict(is_correct=toy.is_last_correct)
    if read:
        sets = {"X": skill("X", "test", seed, "short")}
        accuracy, length = evaluate(student, sets, read, temperature=1.0, **rule)
        return {"new": accuracy["X"], "length": length["X"]}
    student = train_on_skill(student, seed, settings)
    return skill_metrics(student, seed, **rule) | validation(student, seed, **rule)


if __name__ == "__main__":
    runner.main("reasoning")
