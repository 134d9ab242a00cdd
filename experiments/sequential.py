"""Does one model collect skills? X, Y and Z in turn, each stage from where the last one ended.

The paper (Fig. 3, read off; 0 is the base, 1 the best of both methods): SDFT keeps all three skills
at about .85 to .95; SFT loses each one when the next begins, and its first ends at about −.4.

    python -m experiments.sequential --seeds 5

"X" to "prior" are after the last stage, "own" is the mean of every skill right after its own
stage. The matrix of every skill after every stage is in the JSON ("after X: Y"). "KL prior" is the
KL to the base on prior prompts, in nats per response.
"""

import numpy as np

from data import toy
from experiments import runner
from experiments.common import (
    base,
    kl_to_base,
    skill,
    skill_metrics,
    train_on_skill,
    train_to_match,
)
from experiments.settings import SDFT, SDFT_FORWARD, SFT, SFT_OWN

ARMS = {
    "base": {},
    "sft": dict(settings=SFT),
    # Every stage stops as soon as it is as accurate as SDFT's.
    "sft stopped": dict(settings=SFT, match=SDFT),
    "sft, own style": dict(settings=SFT_OWN),
    "sdft": dict(settings=SDFT),
    "sdft, forward KL": dict(settings=SDFT_FORWARD),
}
COLUMNS = ["own", "X", "Y", "Z", "prior", "length", "KL prior"]
WORLDS = [("skills",)]


def measure(seed, settings=None, match=None):
    start = student = other = base(seed)
    metrics, own = {}, []
    for name in toy.NEW if settings else []:
        if match:
            other = train_on_skill(other, seed, match, name)
            student, updates = train_to_match(other, student, seed, settings, name)
            metrics[f"updates {name}"] = updates
        else:
            student = train_on_skill(student, seed, settings, name)
        after = {k: skill_metrics(student, seed, k) for k in toy.NEW}
        metrics |= {f"after {name}: {k}": m["new"] for k, m in after.items()}
        metrics[f"after {name}: prior"] = after[name]["prior"]
        own.append(after[name]["new"])
    if own:
        metrics["own"] = np.mean(own)
    end = {k: skill_metrics(student, seed, k) for k in toy.NEW}
    metrics |= {k: m["new"] for k, m in end.items()}
    metrics |= {f"{k} greedy": m["new greedy"] for k, m in end.items()}
    metrics |= {k: end["X"][k] for k in ("prior", "prior greedy")}
    metrics["length"] = np.mean([m["length"] for m in end.values()])
    prior_prompts = np.concatenate([skill(k, "test", seed, n=50)["prompts"] for k in toy.PRIOR])
    metrics["KL prior"] = kl_to_base(start, student, prior_prompts)
    return metrics


def figure(rows, plt):
    shown = [row for row in rows if row["arm"] in ("sft", "sdft", "sft, own style")]
    base = next(row["metrics"] for row in rows if row["arm"] == "base")
    colours = dict(X="tab:blue", Y="tab:orange", Z="tab:green", prior="black")
    drawn, panels = plt.subplots(1, len(shown), figsize=(12, 3.2), sharey=True)
    for panel, row in zip(panels, shown):
        for c, colour in colours.items():
            after = [row["metrics"][f"after {k}: {c}"] for k in toy.NEW]
            mean, sd = runner.mean_and_sd([base[c], *after])
            fmt = "--o" if c == "prior" else "-o"
            panel.errorbar(range(4), mean, sd, fmt=fmt, color=colour, label=c, capsize=3)
        panel.set_xticks(range(4), ["base", *(f"after {k}" for k in toy.NEW)])
        panel.set(title=row["arm"], ylim=(-0.03, 1.05))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("sampled accuracy")
    runner.grid_and_legend(panels[-1])
    return drawn


if __name__ == "__main__":
    runner.main("sequential")
