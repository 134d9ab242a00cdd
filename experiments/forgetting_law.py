"""Is forgetting told by how far a model has moved from its base, as in RL's Razor (2509.04259)?

    python -m experiments.report out/experiments   # measures it, after the other experiments

Every trained model of the experiments on skill X is a point: KL on X's prompts, in nats per
response, against the loss of greedy accuracy on the prior skills, seed by seed. The KL is taken in
both directions; the fit is a parabola. README.md, "What forgetting follows".
"""

import numpy as np

from experiments import runner

SOURCES = ("pareto", "controls", "demonstrations", "mismatch", "teacher_weights", "kl")
KLS = {"KL": "KL(model ‖ base)", "KL forward": "KL(base ‖ model)"}
METHODS = {"sft": "SFT", "sft stopped": "SFT", "sft, own style": "SFT, own style", "dft": "DFT"}
METHODS |= {f"sft + KL, w {w}": "SFT + KL" for w in ("0.1", "0.3", "1")}
METHODS |= {"sft + replay": "replay", "sft + re-invoke": "re-invoke"}
METHODS |= {"offline, reverse KL": "offline", "offline": "offline"}  # SDFT if none of these
ANCHORED = ("SFT + KL", "replay", "re-invoke")  # whose losses hold them to the base elsewhere


def measure(results):
    """The result over the others': per method, and for all, its points and R² of the fits."""
    groups, rows = {"all": [], "not anchored": []}, []
    for method, *point in dict.fromkeys(points(results)):  # two experiments may share a model
        names = ["all", method] + ["not anchored"] * (method not in ANCHORED)
        for name in names:
            groups.setdefault(name, []).append(point)
    for method, group in groups.items():
        metrics = dict(zip(("loss", *KLS), map(list, zip(*group))))
        fits = {f"R² {name}": r_squared(metrics[name], metrics["loss"]) for name in KLS}
        rows.append({"arm": method, "metrics": {"n": len(group)} | metrics | fits})
    return {"experiment": "forgetting_law", "seeds": [], "rows": rows}


def points(results):
    """Every trained model of SOURCES: (method, loss of prior accuracy, its KL both ways)."""
    start = results["pareto"]["rows"][0]["metrics"]["prior"]  # the base's
    for name in SOURCES:
        for row in results[name]["rows"]:
            method, metrics = METHODS.get(row.get("family"), "SDFT"), row["metrics"]
            if row["arm"] == "base":
                continue
            for before, prior, *kls in zip(start, metrics["prior"], *(metrics[k] for k in KLS)):
                yield method, before - prior, *kls


def r_squared(x, y):
    """The share of y's variance that the best parabola in x explains."""
    fit = np.polyval(np.polyfit(x, y, 2), x)
    return float(1 - np.var(y - fit) / np.var(y))


def figure(rows, plt):
    drawn, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for panel, (direction, name) in zip(panels, KLS.items()):
        for row in rows[2:]:
            x, loss = row["metrics"][direction], row["metrics"]["loss"]
            panel.plot(x, loss, "o", markersize=3, label=row["arm"], alpha=0.7)
        panel.set_xlabel(name)
    panels[0].set_ylabel("loss of prior accuracy")
    return drawn


FORGETTING_LAW = runner.Experiment(
    name="forgetting_law",
    arms=[],
    measure=measure,
    columns=["n", "R² KL", "R² KL forward"],
    figure=figure,
)
