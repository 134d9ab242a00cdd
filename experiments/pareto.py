"""New against prior, fairly: every method at every rate, on skill X.

    python -m experiments.pareto --seeds 5

pareto   The other experiments use the rates that are chosen here (settings.py). A stopped SFT is
         looked at every 5 updates and ends as soon as its validation accuracy is within 0.02 of
         SDFT's; "updates" is when, "matched" whether it got there within the 160 updates
rotated  Another skill for every seed in place of X, at the rates that were chosen on X

README.md, "New against prior".
"""

import numpy as np

from experiments import common, runner, tables
from experiments.common import accuracy, base, skill, skill_metrics, train_on_skill, training
from experiments.settings import HIGH, METHODS, RATES, SDFT, SFT, grid
from experiments.worlds import HALF

STOPPED = {lr: f"sft stopped, {lr:g}" for lr in HIGH}


def measure(seed, settings=None, stop=False):
    """With `stop` it ends as soon as it is as accurate as SDFT, see above."""
    if not stop:
        return common.measure(seed, settings)
    start, validation = base(seed), skill("X", "val", seed)
    goal, _ = train_on_skill(start, seed, SDFT)
    target = accuracy(goal, validation) - 0.02
    data = skill("X", "train", seed, settings["style"])
    student, _, updates = training(start, data, seed, **settings)
    for step, _ in updates:
        matched = step % 5 == 0 and accuracy(student, validation) >= target
        if matched:
            break
    return {"updates": step, "matched": matched} | skill_metrics(student, start, seed)


def derive(metrics):
    """SDFT against the stopped SFT, on the seeds that matched, at the rate that keeps most."""
    metrics["sdft where matched"] = {"prior": []}
    best = metrics["sft where matched"] = {"prior": [], "here": "no rate matched on two seeds"}
    for lr, arm in STOPPED.items():
        matched = np.array(metrics[arm]["matched"]) > 0
        sdft, sft = (np.array(metrics[k]["prior"])[matched] for k in ("sdft", arm))
        if matched.sum() > 1 and (not len(best["prior"]) or sft.mean() > best["prior"].mean()):
            here = " against ".join(map(tables.mean_and_spread, (sdft, sft)))
            best |= {"prior": sft, "here": f"{here}, SFT at {lr:g} on {len(sft)} seeds"}
            metrics["sdft where matched"]["prior"] = sdft


def figure(rows, plt):
    drawn, panel = plt.subplots(figsize=(6, 4.2))
    colours = ["tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:purple", "tab:pink"]
    for family, colour in zip([*METHODS, "sft stopped"], colours):
        metrics = [row["metrics"] for row in rows if row.get("family") == family]
        (x, dx), (y, dy) = (tables.mean_and_sd([m[c] for m in metrics]) for c in ("new", "prior"))
        style = dict(fmt="-o", color=colour, alpha=0.8, elinewidth=0.7, linewidth=0.7)
        panel.errorbar(x, y, dy, dx, label=family, **style)
    start = rows[0]["metrics"]
    panel.plot(np.mean(start["new"]), np.mean(start["prior"]), "k*", markersize=12, label="base")
    panel.set(xlabel="skill X, greedy accuracy", ylabel="prior skills, greedy accuracy")
    panel.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.05))
    return drawn


ARMS = [dict(arm="base"), *grid(dict.fromkeys(METHODS, RATES))]
for lr, arm in STOPPED.items():
    ARMS += [dict(arm=arm, family="sft stopped", settings=SFT | dict(lr=lr), stop=True)]
PARETO = runner.Experiment(
    name="pareto",
    arms=ARMS,
    measure=measure,
    columns=["new", "prior", "sampled", "KL", "updates", "matched"],
    derive=derive,
    figure=figure,
)


def measure_rotated(seed, settings=None):
    return common.measure(seed, settings, HALF[seed % len(HALF)])


ROTATED = runner.Experiment(
    name="rotated",
    arms=[dict(arm="base"), *(dict(arm=k, settings=v) for k, v in METHODS.items())],
    measure=measure_rotated,
    columns=["new", "prior", "sampled", "KL"],
)

if __name__ == "__main__":
    runner.main(__doc__, PARETO, ROTATED)
