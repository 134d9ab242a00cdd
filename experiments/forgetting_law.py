"""Is forgetting told by how far a model has moved from its base, as in RL's Razor (2509.04259)?

    python -m experiments.forgetting_law out/experiments   # after the other experiments

Every trained model of the experiments on skill X is a point: KL on X's prompts, in nats per
response, against the loss of greedy accuracy on the prior skills, seed by seed. The KL is taken in
both directions; the fit is a parabola. README.md, "What forgetting follows".
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from experiments import report, runner

SOURCES = ("pareto", "controls", "demonstrations", "mismatch", "teacher_weights", "kl")
KLS = {"KL": "KL(model ‖ base)", "KL forward": "KL(base ‖ model)"}
METHODS = {"sft": "SFT", "sft stopped": "SFT", "sft, own style": "SFT, own style", "dft": "DFT"}
METHODS |= {f"sft + KL, w {w}": "SFT + KL" for w in ("0.1", "0.3", "1")}
METHODS |= {"sft + replay": "replay", "sft + re-invoke": "re-invoke"}
METHODS |= {"offline, reverse KL": "offline"}  # and SDFT if it is none of these


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, help="--out_dir of finished experiments")
    run = p.parse_args(argv).run
    try:
        rows = measure(run)
        result = {"experiment": "forgetting_law", "seeds": [], "rows": rows}
        report.write(run / "forgetting_law.json", result)
        print("\n".join(table(rows)))
        report.draw(figure, rows, run / "forgetting_law.png")
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


def measure(run):
    """One row per method, and "all": its points, and R² of the fits."""
    groups = {"all": []}
    for method, point in points(run):
        groups["all"].append(point)
        groups.setdefault(method, []).append(point)
    rows = []
    for method, group in groups.items():
        metrics = {name: [point[name] for point in group] for name in ("loss", *KLS)}
        fits = {f"R² {name}": r_squared(metrics[name], metrics["loss"]) for name in KLS}
        rows.append({"arm": method, "metrics": {"n": len(group)} | metrics | fits})
    return rows


def points(run):
    """Every trained model of SOURCES: (method, its KL both ways and loss of prior accuracy)."""
    start = None
    for name in SOURCES:
        try:
            rows = json.loads((run / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError):
            command = f"python -m experiments.all {name} --out_dir {run}"
            raise ValueError(f"{run} has no results of {name}; make them: {command}") from None
        start = start or rows[0]["metrics"]["prior"]  # pareto's base
        for row in rows:
            method = METHODS.get(row.get("family"), "SDFT")
            if row["arm"] == "base" or (name == "controls" and method == "SDFT"):
                continue  # the latter are pareto's
            metrics = row["metrics"]
            for before, prior, *kls in zip(start, metrics["prior"], *(metrics[k] for k in KLS)):
                yield method, {"loss": before - prior} | dict(zip(KLS, kls))


def r_squared(x, y):
    """The share of y's variance that the best parabola in x explains."""
    fit = np.polyval(np.polyfit(x, y, 2), x)
    return float(1 - np.var(y - fit) / np.var(y))


def table(rows):
    yield "| method | models | " + " | ".join(f"R², {name}" for name in KLS.values()) + " |"
    yield "|---|---:|---:|---:|"
    for row in rows:
        fits = [f"{row['metrics'][f'R² {direction}']:.2f}" for direction in KLS]
        yield f"| {row['arm']} | {row['metrics']['n']} | " + " | ".join(fits) + " |"


def derive(metrics):
    metrics["all"]["better R²"] = max(metrics["all"][f"R² {direction}"] for direction in KLS)


def figure(rows, plt):
    drawn, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for panel, (direction, name) in zip(panels, KLS.items()):
        for row in rows[1:]:
            x, loss = row["metrics"][direction], row["metrics"]["loss"]
            panel.plot(x, loss, "o", markersize=3, label=row["arm"], alpha=0.7)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss of prior accuracy")
    report.legend_beside(panels[1])
    return drawn


FORGETTING_LAW = runner.Experiment(
    name="forgetting_law", arms=[], measure=measure, columns=[], derive=derive, table=table
)

if __name__ == "__main__":
    main()
