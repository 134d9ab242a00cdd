"""New against prior, fairly: every method over the same grid of learning rates and numbers of updates, on skill X.

The paper: SFT 66.2 / 53.4 and SDFT 70.2 / 64.5 on Science (new / mean of six old benchmarks, base 65.5); 63.2 / 56.0 and
70.6 / 65.4 on tool use. One replication found most of the difference gone where SFT was stopped at matched accuracy.

    python -m experiments.pareto --seeds 5

Expect SDFT's frontier above and to the right of SFT's, also of SFT stopped when it has reached SDFT's accuracy, and SFT in the
model's own style on SDFT's frontier.

Every point is measured on validation inputs as well ("val new", "val prior"): `chosen` in settings.py picks from those what the
other experiments use. "updates" is where a stopped SFT reached SDFT's accuracy on validation inputs, 400 where it never did.
"""

import numpy as np

from experiments import runner
from experiments.common import base, skill_metrics, train_on_skill, train_to_match, validation
from experiments.settings import SDFT, SFT, grid
from train_toy import sft

FAMILIES = {
    "sft": dict(method=sft, style="expert"),
    "sft own style": dict(method=sft, style="own"),
    "sdft": dict(method="sdft"),
    "sdft forward": dict(method="sdft", kl="forward"),
}
ARMS = {"base": {}} | {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
ARMS |= {f"sft stopped, {lr:g}": dict(settings=SFT | dict(lr=lr), match=SDFT) for lr in (1e-4, 3e-4, 1e-3)}
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
    mean = {r["arm"]: [np.mean(r["metrics"][m]) for m in ("new", "prior")] for r in rows}
    spread = {r["arm"]: [np.std(r["metrics"][m], ddof=len(r["metrics"][m]) > 1) for m in ("new", "prior")] for r in rows}
    for family, colour in zip([*FAMILIES, "sft stopped"], ["tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:pink"]):
        arms = [a for a in mean if a.split(", ")[0] == family]
        x, y = zip(*(mean[a] for a in arms))
        dx, dy = zip(*(spread[a] for a in arms))
        panel.errorbar(x, y, dy, dx, fmt="o", color=colour, label=family, alpha=0.8, elinewidth=0.7)
    panel.plot(*mean["base"], "k*", markersize=12, label="base")
    panel.set(xlabel="skill X, sampled accuracy", ylabel="prior skills, sampled accuracy", xlim=(-0.03, 1.05), ylim=(-0.03, 1.05))
    panel.grid(alpha=0.3)
    panel.legend(loc="lower left", fontsize=8)
    return drawn


if __name__ == "__main__":
    runner.main("pareto")
