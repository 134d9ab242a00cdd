"""Does one model collect skills? Each stage starts from where the last one ended.

    python -m experiments.sequential --seeds 5

toy          train_toy.py, over seeds, with SFT in the model's own style beside it
sequential   The same in the other experiments' world, with equal updates for all methods. "X" to
             "prior" are after the last stage, "own" is the mean of every skill right after its
             own, "after X: Y" the skill Y after stage X
many_stages  Eight skills, then five of which the base was rarely right, 60 updates each. "own" is
             the mean over the eight right after their stages, "8" and "end" after stages 8 and 13;
             "prior 4" to "prior 13" are the prior skills. "KL prior" is on their prompts

README.md, "Three skills in turn" and "Many stages".
"""

import numpy as np

from data import toy
from experiments import common, runner, tables
from experiments.common import base, kl, on_texts, skill, teacher_texts, train, train_on_skill
from experiments.settings import METHODS, SDFT, SFT, SFT_OWN
from experiments.worlds import COLD, HALF
from train_toy import evaluate


def kl_prior(model, start, test):
    rows = {key: np.concatenate([test[k][key] for k in toy.PRIOR]) for key in test["A"]}
    return kl(model, start, rows)


# --- Three skills --------------------------------------------------------------------------------


def measure(seed, settings=None, world="skills"):
    start = student = base(seed, world)
    test = {k: skill(k, "test", seed, n=100 if k in toy.PRIOR else 400) for k in toy.SKILLS}
    metrics = {}
    for name in toy.NEW if settings else []:
        student, _ = train_on_skill(student, seed, settings, name)
        after = accuracies(student, test)
        metrics |= {f"after {name}: {k}": value for k, value in after.items()}
    if settings:
        metrics["own"] = np.mean([metrics[f"after {k}: {k}"] for k in toy.NEW])
    return metrics | accuracies(student, test) | {"KL prior": kl_prior(student, start, test)}


def accuracies(model, test):
    """Greedy accuracy on every skill, and the mean over the prior ones."""
    accuracy, _ = evaluate(model, test)
    return accuracy | {"prior": common.prior_of(accuracy)}


def derive(metrics):
    """The mean at the end, and X kept in the unit of Fig. 3: 0 is the base, 1 the best after X."""
    for of_arm in metrics.values():
        of_arm["end"] = np.mean([of_arm[k] for k in toy.NEW], 0)
    start = np.array(metrics["base"]["X"])
    best = np.maximum(*(metrics[arm]["after X: X"] for arm in ("sft", "sdft")))
    for arm in ("sft", "sdft"):
        metrics[arm]["X kept"] = (metrics[arm]["X"] - start) / np.maximum(best - start, 1 / 400)


def figure(rows, plt):
    arms = {row["arm"]: row["metrics"] for row in rows}
    stages = lambda arm, c: [arms["base"][c], *(arms[arm][f"after {k}: {c}"] for k in toy.NEW)]
    titles = {"sft": "SFT", "sft, own style": "SFT, own style", "sdft": "SDFT"}
    panels = {t: {c: stages(arm, c) for c in [*toy.NEW, "prior"]} for arm, t in titles.items()}
    return tables.panels_of_lines(plt, panels, ["base", *(f"after {k}" for k in toy.NEW)])


COLUMNS = ["own", "X", "Y", "Z", "prior", "KL prior"]
SEQUENTIAL = runner.Experiment(
    name="sequential",
    arms=[dict(arm="base"), *(dict(arm=k, settings=settings) for k, settings in METHODS.items())],
    measure=measure,
    columns=COLUMNS,
    derive=derive,
    figure=figure,
)
TOY_METHODS = {
    "sft": SFT | dict(lr=1e-3, batch_size=64),
    "sft, own style": SFT_OWN | dict(lr=1e-4, steps=60, batch_size=64),
    "sdft": SDFT | dict(steps=80, batch_size=64),
}
TOY = runner.Experiment(
    name="toy",
    arms=[dict(arm="base", world="toy")]
    + [dict(arm=k, world="toy", settings=settings) for k, settings in TOY_METHODS.items()],
    measure=measure,
    columns=COLUMNS,
    bases=[dict(world="toy")],
    derive=derive,
    figure=figure,
)


# --- Thirteen skills -----------------------------------------------------------------------------


def measure_many(seed, settings=None, original=False):
    """With the original base as every stage's teacher, or that of the stage's start."""
    start = student = teacher = base(seed)
    settings = settings | dict(teacher=start) if original else settings
    stages, names = [*HALF, *reversed(COLD)], [*toy.PRIOR, *HALF]
    test = {k: skill(k, "test", seed, n=100) for k in names}
    half = lambda accuracy: np.mean([accuracy[k] for k in HALF])
    metrics, own, accuracy = {}, [], evaluate(student, test)[0]
    for i, name in enumerate(stages, 1):
        if settings:
            data = skill(name, "train", seed, settings["style"])
            data |= teacher_texts(start, data, seed)
            student, teacher = train(student, data, seed, **settings)
            accuracy = evaluate(student, test)[0]
        metrics[f"prior {i}"] = common.prior_of(accuracy)
        if name in HALF:
            own.append(accuracy[name])
        if i == len(HALF):
            metrics["8"] = half(accuracy)
    metrics["own"], metrics["end"] = np.mean(own), half(accuracy)
    taught = evaluate(teacher, {k: test[k] for k in HALF}, "teacher_prompts")[0]
    metrics["teacher"] = np.mean([*taught.values()])
    return metrics | {"KL prior": kl_prior(student, start, test)}


def figure_of_many(rows, plt):
    stages = [*range(1, len(HALF) + len(COLD) + 1)]
    lines = {row["arm"]: [row["metrics"][f"prior {i}"] for i in stages] for row in rows[1:]}
    return tables.panels_of_lines(plt, {"prior skills": lines}, stages, "skills learned")


SHORT = dict(steps=60)
EMA = SDFT | SHORT | dict(lr=2e-4)
FROZEN = EMA | dict(alpha=0.0)
MANY_STAGES = runner.Experiment(
    name="many_stages",
    arms=[
        dict(arm="base"),
        dict(arm="sft", settings=SFT | SHORT),
        dict(arm="sft, own style", settings=SFT_OWN | SHORT | dict(lr=2e-4)),
        dict(arm="sdft, EMA teacher", settings=EMA),
        dict(arm="sdft, teacher of the stage's start", settings=FROZEN),
        dict(arm="sdft, original teacher", settings=FROZEN, original=True),
        dict(arm="offline, original teacher", original=True)
        | dict(settings=FROZEN | dict(method=on_texts)),
    ],
    measure=measure_many,
    columns=["own", "8", "end", "prior 4", "prior 8", "prior 13", "teacher", "KL prior"],
    figure=figure_of_many,
)

if __name__ == "__main__":
    runner.main(__doc__, TOY, SEQUENTIAL, MANY_STAGES)
