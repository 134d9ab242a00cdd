"""Demonstrations: how many does it take, and what do bad ones do?

    python -m experiments.demonstrations --seeds 5

demonstrations  8 to 400 of them, on skill X; 160 updates for every number
mismatch        a share of them is spoiled, see `spoil` in worlds.py. "teacher" is the base's
                accuracy with the training demonstrations, spoiled ones included

README.md, "Few demonstrations" and "Bad demonstrations".
"""

from experiments import report, runner
from experiments.common import base, skill, skill_metrics, train
from experiments.settings import LOW, METHODS, RATES, SDFT, SDFT_FORWARD, SFT_OWN, chosen, grid
from experiments.worlds import spoil
from train_toy import evaluate, sdft


def measure(seed, n, settings):
    start = base(seed)
    student, _ = train(start, skill("X", "train", seed, settings["style"], n), seed, **settings)
    return skill_metrics(student, start, seed)


def figure(rows, plt):
    return report.new_and_prior(chosen(rows, DEMONSTRATIONS.choose_by), plt, "n", "demonstrations")


RATES_OF = {"sft": RATES, "sft, own style": LOW, "sdft": LOW, "sdft, forward KL": LOW}
DEMONSTRATIONS = runner.Experiment(
    name="demonstrations",
    arms=[
        arm for n in (8, 16, 32, 64, 128, 400) for arm in grid(RATES_OF, condition=f"{n}, ", n=n)
    ],
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
        metrics["teacher"] = evaluate(start, {"X": data}, "teacher_prompts")[0]["X"]
    return metrics


def spoiled(kind, family, suffix=""):
    return [
        dict(arm=f"{share:.0%} {kind}{suffix}", family=family, kind=kind, share=share)
        | dict(settings=METHODS[family])
        for share in (0.2, 1.0)
    ]


ARMS = [dict(arm="none", family="sdft", settings=SDFT)]
ARMS += [dict(arm="none, forward KL", family="sdft, forward KL", settings=SDFT_FORWARD)]
ARMS += [dict(arm="none, sft in own style", family="sft, own style", settings=SFT_OWN)]
ARMS += spoiled("wrong", "sdft") + spoiled("another row's", "sdft") + spoiled("one for all", "sdft")
ARMS += spoiled("wrong", "sdft, forward KL", ", forward KL")
ARMS += spoiled("wrong", "sft, own style", ", sft in own style")
MISMATCH = runner.Experiment(
    name="mismatch",
    arms=ARMS,
    measure=measure_mismatch,
    columns=["new", "prior", "sampled", "teacher", "KL"],
)

if __name__ == "__main__":
    runner.main(__doc__, DEMONSTRATIONS, MISMATCH)
