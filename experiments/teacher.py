"""Is the demonstration-conditioned teacher good, and close to the base?

The paper (ToolAlpaca): the base is right 42%, the teacher 100%; KL to the base: SFT 1.26 nats,
teacher 0.68.

    python -m experiments.teacher --seeds 5

"accuracy" on skill X is greedy, "KL" is KL(model ‖ base) on the prompts of skill X (which the
base reads without a demonstration), in nats per response.
"""

from experiments import runner, verdicts
from experiments.common import base, kl, skill, train_on_skill
from experiments.settings import SDFT, SDFT_FORWARD, SFT, SFT_OWN
from train_toy import evaluate

ARMS = {
    "base": {},
    "teacher": dict(read="teacher_prompts"),
    "sft": dict(settings=SFT),
    "sft, own style": dict(settings=SFT_OWN),
    "sdft": dict(settings=SDFT),
    "sdft, forward KL": dict(settings=SDFT_FORWARD),
}
COLUMNS = ["accuracy", "KL"]
WORLDS = [("skills",)]


def measure(seed, settings=None, read="prompts"):
    start, test = base(seed), skill("X", "test", seed)
    model = train_on_skill(start, seed, settings)
    accuracy = evaluate(model, {"X": test}, read)[0]["X"]
    return {
        "accuracy": accuracy,
        "KL": kl(model, start, test["prompts"], test["answers"], test[read]),
    }


def claims(at):
    base, teacher = (at(arm, "accuracy") for arm in ("base", "teacher"))
    yield (
        "the teacher is good (accuracy above .95)",
        "base 42%, teacher 100%",
        f"base {runner.mean_and_spread(base)}, teacher {runner.mean_and_spread(teacher)}",
        verdicts.more(teacher, 0 * teacher + 0.95),
    )
    of = {name: at(name.lower(), "KL") for name in ("SFT", "teacher", "SDFT")}
    yield (
        "the teacher is closer to the base than SFT is (KL, nats per response)",
        "SFT 1.26, teacher 0.68",
        ", ".join(f"{name} {runner.mean_and_spread(values)}" for name, values in of.items()),
        verdicts.more(of["SFT"], of["teacher"]),
    )


if __name__ == "__main__":
    runner.main("teacher")
