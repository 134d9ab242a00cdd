"""Which weights should the teacher have?

A moving average of the student's (EMA), the start's (frozen), or the student's own (live). The
paper (tool use): EMA about 70, frozen about 65, and with a live teacher training diverges.

    python -m experiments.teacher_weights --seeds 5

α is the student's share in the teacher at every update: 0 frozen, 1 live. On skill X with SDFT's
settings, at the highest rate of the sweep ("fast"), and with 30% of the demonstrations wrong
("noisy"), where the teacher starts out imperfect and a moving one could gain. "teacher" is the
final teacher's accuracy with right demonstrations, "teacher, noisy" with the training's.
"collapsed" is the share of seeds that end below half of the base's accuracy on X.
"""

from experiments import runner, verdicts
from experiments.common import base, skill, skill_metrics, train
from experiments.mismatch import spoiled
from experiments.settings import RATES, SDFT
from train_toy import evaluate

ALPHAS = {"frozen": 0.0, "α .02": 0.02, "α .2": 0.2, "live": 1.0}
ARMS = {arm: dict(settings=SDFT | dict(alpha=alpha)) for arm, alpha in ALPHAS.items()}
for arm, alpha in ALPHAS.items():
    settings = SDFT | dict(alpha=alpha)
    ARMS[f"fast, {arm}"] = dict(settings=settings | dict(lr=RATES[-1]))
    ARMS[f"noisy, {arm}"] = dict(settings=settings | dict(lr=2e-4), share=0.3)
ARMS = dict(sorted(ARMS.items(), key=lambda item: item[0].split(", ")[:-1]))
COLUMNS = ["new", "prior", "sampled", "teacher", "teacher, noisy", "collapsed"]
WORLDS = [("skills",)]


def measure(seed, settings, share=0.0):
    start, test = base(seed), {"X": skill("X", "test", seed)}
    data = spoiled(skill("X", "train", seed), "wrong", share, seed)
    student, teacher = train(start, data, seed, **settings)
    metrics = skill_metrics(student, start, seed)
    metrics["teacher"] = evaluate(teacher, test, "teacher_prompts")[0]["X"]
    metrics["teacher, noisy"] = evaluate(teacher, {"X": data}, "teacher_prompts")[0]["X"]
    metrics["collapsed"] = metrics["new"] < 0.5 * evaluate(start, test)[0]["X"]
    return metrics


def claims(at):
    for condition, name in {
        "": "",
        "fast, ": " at the highest rate",
        "noisy, ": ", 30% of the demonstrations wrong",
    }.items():
        pair = [at(condition + arm, "new") for arm in ("α .02", "frozen")]
        yield (
            f"an EMA teacher (α .02) does better than a frozen one{name} (new)",
            "about 70 against 65",
            verdicts.against(*pair),
            verdicts.more(*pair),
        )
    live, fast = (at(arm, "collapsed") for arm in ("live", "fast, live"))
    pair = [at(arm, "new") for arm in ("α .02", "live")]
    yield (
        "a live teacher does worse than an EMA (new; collapsed seeds)",
        "training diverges",
        f"{verdicts.against(*pair)}; collapsed {live.sum():.0f} of {len(live)}, at the highest "
        f"rate {fast.sum():.0f} of {len(fast)}",
        verdicts.more(*pair),
    )


if __name__ == "__main__":
    runner.main("teacher_weights")
