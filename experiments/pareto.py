"""New against prior, fairly: every method over the same grid of rates and updates, on skill X.

The paper (new / mean of six old benchmarks, base 65.5): Science, SFT 66.2 / 53.4 and SDFT 70.2 /
64.5; tool use, SFT 63.2 / 56.0 and SDFT 70.6 / 65.4. One replication found most of the difference
gone when SFT was stopped at matched accuracy.

    python -m experiments.pareto --seeds 5

Every point is measured on validation inputs as well ("val new", "val prior"): `chosen` in
settings.py picks from those what the other experiments use. "updates" is when a stopped SFT reached
SDFT's accuracy on validation inputs, 400 if it never did.
"""

import numpy as np

from experiments import runner
from experiments.common import base, skill_metrics, train_on_skill, train_to_match, validation
from experiments.settings import SDFT, SFT, grid
from train_toy import sdft_step, sft_step

FAMILIES = {
    "sft": dict(step=sft_step, style="expert"),
    "sft own style": dict(step=sft_step, style="own"),
    "sdft": dict(step=sdft_step),
    "sdft forward": dict(step=sdft_step, divergence="forward"),
}
ARMS = {"base": {}} | {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
for lr in (1e-4, 3e-4, 1e-3):
    ARMS[f"sft stopped, {lr:g}"] = dict(settings=SFT | dict(lr=lr), match=SDFT)
COLUMNS = ["new", "prior", "length", "val new", "val prior", "updates"]
WORLDS = [("skills",)]


def measure(seed, settings=None, match=None):
    student, metrics = base(seed), {}
    if match:
        other = train_on_skill(student, seed, match)
        student, metrics["updates"] = train_to_match(other, student, seed, settings)
    else:
        student = train_on_skill(student, seed, settings)
    return metrics | skill_metrics(student, seed) | validation(student, seed)


def figure(rows, plt):
    drawn, panel = plt.subplots(figsize=(6, 4.2))
    colours = ["tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:pink"]
    for family, colour in zip([*FAMILIES, "sft stopped"], colours):
        metrics = [r["metrics"] for r in rows if r["arm"].split(", ")[0] == family]
        (x, dx), (y, dy) = (runner.mean_and_sd([m[c] for m in metrics]) for c in ("new", "prior"))
        style = dict(fmt="o", color=colour, alpha=0.8, elinewidth=0.7)
        panel.errorbar(x, y, dy, dx, label=family, **style)
    base = next(r["metrics"] for r in rows if r["arm"] == "base")
    panel.plot(np.mean(base["new"]), np.mean(base["prior"]), "k*", markersize=12, label="base")
    panel.set(xlabel="skill X, sampled accuracy", ylabel="prior skills, sampled accuracy")
    panel.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.05))
    runner.grid_and_legend(panel)
    return drawn


if __name__ == "__main__":
    runner.main("pareto")
