"""Answer-only demonstrations: does a model that reasons keep reasoning?

The paper (accuracy / tokens per response): base 31.2 / 4612, SFT 23.5 / 3273, SDFT 43.7 / 4180.

    python -m experiments.reasoning --seeds 5

Skill X with prompts of 5 digits, whose answers are three reasoning steps and a result; the
demonstrations hold the result only, `i.`. An answer counts if it ends and its last token is the
correct result, with or without reasoning: with it, a response has 5 tokens, the end token included,
without it 2. The rates are chosen on validation inputs.
"""

from data import toy
from experiments import runner, verdicts
from experiments.common import base, skill, skill_metrics, train_on_skill, validation
from experiments.settings import HIGH, MIDDLE, grid
from train_toy import evaluate, sdft_step, sft_step

FAMILIES = {
    "sft": dict(step=sft_step, style="short", rates=HIGH),
    "sdft": dict(step=sdft_step, style="short", rates=MIDDLE),
    "sdft, forward KL": dict(step=sdft_step, style="short", divergence="forward", rates=MIDDLE),
}
ARMS = {"base": {}, "teacher": dict(read="teacher_prompts")}
ARMS |= {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
COLUMNS = ["new", "sampled", "prior", "length", "val new", "val prior"]
WORLDS = [("long",)]
SWEEP = ("val new", "val prior")


def measure(seed, settings=None, read=None):
    start, rule = base(seed, "long"), dict(is_correct=toy.is_last_correct, world="long")
    if read:
        sets = {"X": skill("X", "test", seed, "short", world="long")}
        accuracy, length = evaluate(start, sets, read, is_correct=toy.is_last_correct)
        return {"new": accuracy["X"], "length": length["X"]}
    student = train_on_skill(start, seed, settings, world="long")
    return skill_metrics(student, start, seed, **rule) | validation(student, seed, **rule)


def claims(at):
    arms = {"base": "base", "SFT": "sft", "SDFT": "sdft"}
    new, length = ({k: at(arm, m) for k, arm in arms.items()} for m in ("new", "length"))
    shown = (
        f"{k} {runner.mean_and_spread(new[k])} / {runner.mean_and_spread(length[k])}" for k in arms
    )
    yield (
        "answer-only demonstrations: SDFT learns (accuracy / tokens)",
        "base 31.2/4612, SFT 23.5/3273, SDFT 43.7/4180",
        "; ".join(shown),
        verdicts.more(new["SDFT"], new["base"]),
    )
    yield (
        "SDFT keeps reasoning there (tokens, at least .95 of the base's)",
        "4180 of 4612",
        verdicts.against(length["SDFT"], length["base"]),
        verdicts.kept(length["SDFT"], length["base"], 0.95),
    )
    yield (
        "SFT falls below the base there",
        "23.5 against 31.2",
        verdicts.against(new["SFT"], new["base"]),
        verdicts.more(new["base"], new["SFT"]),
    )


if __name__ == "__main__":
    runner.main("reasoning")
