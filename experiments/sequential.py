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
from experiments import runner, verdicts
from experiments.common import base, kl, skill, train_on_skill
from experiments.settings import SDFT, SDFT_FORWARD, SDFT_JSD, SFT, SFT_OWN
from train_toy import evaluate

ARMS = {
    "base": {},
    "sft": dict(settings=SFT),
    "sft, own style": dict(settings=SFT_OWN),
    "sdft": dict(settings=SDFT),
    "sdft, forward KL": dict(settings=SDFT_FORWARD),
    "sdft, JSD": dict(settings=SDFT_JSD),
}
COLUMNS = ["own", "X", "Y", "Z", "prior", "KL prior"]
WORLDS = [("skills",)]


def measure(seed, settings=None):
    start = student = base(seed)
    test = {k: skill(k, "test", seed, n=100 if k in toy.PRIOR else 400) for k in toy.KNOWN}
    metrics, own = {}, []
    for name in toy.NEW if settings else []:
        student = train_on_skill(student, seed, settings, name)
        after = accuracies(student, test)
        metrics |= {f"after {name}: {k}": value for k, value in after.items()}
        own.append(after[name])
    if own:
        metrics["own"] = np.mean(own)
    metrics |= accuracies(student, test)
    rows = {key: np.concatenate([test[k][key] for k in toy.PRIOR]) for key in test["A"]}
    metrics["KL prior"] = kl(student, start, rows["prompts"], rows["answers"])
    return metrics


def accuracies(model, test):
    """Greedy accuracy on X, Y and Z, and the mean over the prior skills."""
    accuracy, _ = evaluate(model, test)
    prior = np.mean([accuracy[k] for k in toy.PRIOR])
    return {k: accuracy[k] for k in toy.NEW} | {"prior": prior}


def unit(at, arm, metric="X"):
    """X, after the last stage, in the unit of Fig. 3, per seed: 0 the base, 1 the best of both."""
    best = np.maximum(at("sft", "after X: X"), at("sdft", "after X: X"))
    start = at("base", "X")
    return (at(arm, metric) - start) / np.maximum(best - start, 1 / 400)


def claims(at):
    sft, sdft = unit(at, "sft"), unit(at, "sdft")
    yield (
        "SFT loses a skill when the next begins (X after Z; 0 = base, 1 = best; lost: below half)",
        "about −.4",
        runner.mean_and_spread(sft),
        verdicts.more(0.5 * unit(at, "sft", "after X: X"), sft),
    )
    yield (
        "SDFT keeps the first skill (the same; kept: above .7)",
        "about .85 to .95",
        runner.mean_and_spread(sdft),
        verdicts.more(sdft, 0 * sdft + 0.7),
    )
    prior = at("sdft", "prior")
    yield (
        "SDFT keeps the prior skills over three stages (at least .93)",
        "no loss",
        runner.mean_and_spread(prior),
        verdicts.more(prior, 0 * prior + 0.93, margin=0),
    )


def figure(rows, plt):
    shown = [row for row in rows if row["arm"] in ("sft", "sdft", "sft, own style")]
    start = next(row["metrics"] for row in rows if row["arm"] == "base")
    colours = dict(X="tab:blue", Y="tab:orange", Z="tab:green", prior="black")
    drawn, panels = plt.subplots(1, len(shown), figsize=(12, 3.2), sharey=True)
    for panel, row in zip(panels, shown):
        for c, colour in colours.items():
            after = [row["metrics"][f"after {k}: {c}"] for k in toy.NEW]
            mean, sd = runner.mean_and_sd([start[c], *after])
            fmt = "--o" if c == "prior" else "-o"
            panel.errorbar(range(4), mean, sd, fmt=fmt, color=colour, label=c, capsize=3)
        panel.set_xticks(range(4), ["base", *(f"after {k}" for k in toy.NEW)])
        panel.set(title=row["arm"], ylim=(-0.03, 1.05))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("greedy accuracy")
    runner.grid_and_legend(panels[-1])
    return drawn


if __name__ == "__main__":
    runner.main("sequential")
