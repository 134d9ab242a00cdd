"""Does one model collect skills? Each stage starts from where the last one ended.

The paper (Fig. 3, read off; 0 is the base, 1 the best of both methods): SDFT keeps three skills at
about .85 to .95; SFT loses each one when the next begins, and its first ends at about −.4. A
follow-up found, after 20 writes, a model that is its own moving teacher worst, and the original
model as a fixed teacher best (arXiv 2607.11020).

    python -m experiments.sequential --seeds 5

sequential   X, Y and Z in turn. "X" to "prior" are after the last stage, "own" is the mean of every
             skill right after its own, "after X: Y" the skill Y after stage X
many_stages  Eight skills, then five of which the base was rarely right, 60 updates each. "own" is
             the mean over the eight right after their stages, "8" and "end" after stages 8 and 13;
             "prior 4" to "prior 13" are the prior skills. "KL prior" is on their prompts
"""

import numpy as np

from data import toy
from experiments import report, runner
from experiments.common import base, kl, skill, train_on_skill
from experiments.settings import METHODS, SDFT, SFT, SFT_OWN
from experiments.worlds import COLD, HALF
from train_toy import evaluate


def prior_of(accuracy):
    return np.mean([accuracy[k] for k in toy.PRIOR])


def kl_prior(model, start, test):
    rows = {key: np.concatenate([test[k][key] for k in toy.PRIOR]) for key in test["A"]}
    return kl(model, start, rows)


# --- Three skills --------------------------------------------------------------------------------


def measure(seed, settings=None):
    start = student = base(seed)
    test = {k: skill(k, "test", seed, n=100 if k in toy.PRIOR else 400) for k in toy.SKILLS}
    metrics, own = {}, []
    for name in toy.NEW if settings else []:
        student, _ = train_on_skill(student, seed, settings, name)
        after = accuracies(student, test)
        metrics |= {f"after {name}: {k}": value for k, value in after.items()}
        own.append(after[name])
    if own:
        metrics["own"] = np.mean(own)
    return metrics | accuracies(student, test) | {"KL prior": kl_prior(student, start, test)}


def accuracies(model, test):
    """Greedy accuracy on X, Y and Z, and the mean over the prior skills."""
    accuracy, _ = evaluate(model, test)
    return {k: accuracy[k] for k in toy.NEW} | {"prior": prior_of(accuracy)}


def derive(metrics):
    """X in the unit of Fig. 3, per seed: 0 is the base, 1 the best of both after X's stage."""
    start = np.array(metrics["base"]["X"])
    best = np.maximum(*(metrics[arm]["after X: X"] for arm in ("sft", "sdft")))
    for arm in ("sft", "sdft"):
        unit = lambda metric: (metrics[arm][metric] - start) / np.maximum(best - start, 1 / 400)
        metrics[arm] |= {"X kept": unit("X"), "half of own X": 0.5 * unit("after X: X")}


def figure(rows, plt):
    shown = [row for row in rows if row["arm"] in ("sft", "sdft", "sft, own style")]
    start = rows[0]["metrics"]
    colours = dict(X="tab:blue", Y="tab:orange", Z="tab:green", prior="black")
    drawn, panels = plt.subplots(1, len(shown), figsize=(12, 3.2), sharey=True)
    for panel, row in zip(panels, shown):
        for c, colour in colours.items():
            after = [row["metrics"][f"after {k}: {c}"] for k in toy.NEW]
            fmt = "--o" if c == "prior" else "-o"
            report.line(panel, range(4), [start[c], *after], c, fmt, color=colour)
        panel.set_xticks(range(4), ["base", *(f"after {k}" for k in toy.NEW)])
        panel.set(title=row["arm"], ylim=(-0.03, 1.05))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("greedy accuracy")
    report.grid_and_legend(panels[-1])
    return drawn


SEQUENTIAL = runner.Experiment(
    name="sequential",
    arms=[dict(arm="base"), *(dict(arm=k, settings=settings) for k, settings in METHODS.items())],
    measure=measure,
    columns=["own", "X", "Y", "Z", "prior", "KL prior"],
    derive=derive,
    figure=figure,
)


# --- Thirteen skills -----------------------------------------------------------------------------


def measure_many(seed, settings=None, original=False):
    start = student = teacher = base(seed)
    if original:
        settings = settings | dict(teacher=start)
    stages, names = [*HALF, *reversed(COLD)], [*toy.PRIOR, *HALF]
    test = {k: skill(k, "test", seed, n=100) for k in names}
    half = lambda accuracy: np.mean([accuracy[k] for k in HALF])
    metrics, own, accuracy = {}, [], evaluate(student, test)[0]
    for i, name in enumerate(stages, 1):
        if settings:
            student, teacher = train_on_skill(student, seed, settings, name)
            accuracy = evaluate(student, test)[0]
        metrics[f"prior {i}"] = prior_of(accuracy)
        if name in HALF:
            own.append(accuracy[name])
        if i == len(HALF):
            metrics["8"] = half(accuracy)
    metrics["own"], metrics["end"] = np.mean(own), half(accuracy)
    taught = evaluate(teacher, {k: test[k] for k in HALF}, "teacher_prompts")[0]
    metrics["teacher"] = np.mean([*taught.values()])
    return metrics | {"KL prior": kl_prior(student, start, test)}


def figure_of_many(rows, plt):
    drawn, panel = plt.subplots(figsize=(6.5, 3.4))
    stages = [*range(1, len(HALF) + len(COLD) + 1)]
    for row in rows[1:]:
        values = [row["metrics"][f"prior {i}"] for i in stages]
        report.line(panel, stages, values, row["arm"], markersize=3)
    panel.set(xlabel="skills learned", ylabel="prior skills, greedy accuracy", ylim=(-0.03, 1.05))
    report.grid_and_legend(panel)
    return drawn


SHORT = dict(steps=60)
EMA = SDFT | SHORT | dict(lr=2e-4)
MANY_STAGES = runner.Experiment(
    name="many_stages",
    arms=[
        dict(arm="base"),
        dict(arm="sft", settings=SFT | SHORT),
        dict(arm="sft, own style", settings=SFT_OWN | SHORT | dict(lr=2e-4)),
        dict(arm="sdft, EMA teacher", settings=EMA),
        dict(arm="sdft, teacher of the stage's start", settings=EMA | dict(alpha=0.0)),
        dict(arm="sdft, original teacher", settings=EMA | dict(alpha=0.0), original=True),
    ],
    measure=measure_many,
    columns=["own", "8", "end", "prior 4", "prior 8", "prior 13", "teacher", "KL prior"],
    figure=figure_of_many,
)

if __name__ == "__main__":
    runner.main(__doc__, SEQUENTIAL, MANY_STAGES)
