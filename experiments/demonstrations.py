"""Demonstrations: how many does it take, and what do bad ones do?

    python -m experiments.demonstrations --seeds 5

demonstrations  8 to 400 of them, on skill X; 160 updates for every number
mismatch        a share of them is spoiled, see `spoil` in worlds.py. "teacher" is the base's
                accuracy with the training demonstrations, spoiled ones included

README.md, "Few demonstrations" and "Bad demonstrations".
"""

from experiments import report, runner
from experiments.common import accuracy, base, skill, skill_metrics, train
from experiments.settings import LOW, METHODS, RATES, chosen, grid
from experiments.worlds import spoil
from train_toy import sdft


def measure(seed, n, settings):
    start = base(seed)
    student, _ = train(start, skill("X", "train", seed, settings["style"], n), seed, **settings)
    return skill_metrics(student, start, seed)


def figure(rows, plt):
    return report.new_and_prior(chosen(rows, DEMONSTRATIONS.choose_by), plt, "n", "demonstrations")


RATES_OF = {"sft": RATES, "sft, own style": LOW, "sdft": LOW, "sdft, forward KL": LOW}
NUMBERS = (8, 16, 32, 64, 128, 400)
DEMONSTRATIONS = runner.Experiment(
    name="demonstrations",
    arms=[arm for n in NUMBERS for arm in grid(RATES_OF, condition=f"{n}, ", n=n)],
    measure=measure,
    columns=["new", "sampled", "prior", "KL"],
    choose_by=("val new", "val prior"),
    figure=figure,
)


def measure_mismatch(seed, settings, kind="wrong", share=0.0):
    start = base(seed)
    data = spoil(skill("X", "train", seed, settings["style"]), kind, share, seed)
    student, _ = train(start, data, seed, **settings)
    metrics = skill_metrics(student, start, seed)
    if settings["method"] is sdft:
        metrics["teacher"] = accuracy(start, data, "teacher_prompts")
    return metrics


ARMS = [dict(arm="none", family="sdft"), dict(arm="none, forward KL", family="sdft, forward KL")]
ARMS += [dict(arm="none, sft in own style", family="sft, own style")]
for kind, family, suffix in [
    ("wrong", "sdft", ""),
    ("another row's", "sdft", ""),
    ("one for all", "sdft", ""),
    ("wrong", "sdft, forward KL", ", forward KL"),
    ("wrong", "sft, own style", ", sft in own style"),
]:
    for share in (0.2, 1.0):
        name = f"{share:.0%} {kind}{suffix}"
        ARMS += [dict(arm=name, family=family, kind=kind, share=share)]
ARMS = [arm | dict(settings=METHODS[arm["family"]]) for arm in ARMS]
MISMATCH = runner.Experiment(
    name="mismatch",
    arms=ARMS,
    measure=measure_mismatch,
    columns=["new", "prior", "sampled", "teacher", "KL"],
)

if __name__ == "__main__":
    runner.main(__doc__, DEMONSTRATIONS, MISMATCH)
