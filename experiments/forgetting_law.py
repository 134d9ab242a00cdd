"""Is forgetting told by how far a model has moved from its base?

*RL's Razor* (arXiv 2509.04259): whatever the method, the loss of prior abilities follows the KL
between base and trained model on the *new* task's prompts, with a quadratic fit of R² .96 in a toy
and .71 on language models.

    python -m experiments.forgetting_law out/experiments   # after the other experiments

Every trained model of the experiments on skill X is a point: KL on X's prompts, in nats per
response, against the loss of greedy accuracy on the prior skills, seed by seed. The KL is taken in
both directions; the fit is a parabola through all points and through each method's.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from experiments import runner

SOURCES = ("pareto", "controls", "demonstrations", "mismatch", "teacher_weights", "kl")
KLS = ("KL", "KL forward")
METHODS = {  # the first that an arm's name holds, in lower case
    "sft + replay": "replay",
    "sft + re-invoke": "re-invoke",
    "sft + kl": "SFT + KL",
    "own style": "SFT, own style",
    "offline": "offline",
    "sdft": "SDFT",
    "dft": "DFT",
    "sft": "SFT",
}


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, help="--out_dir of finished experiments")
    try:
        run = p.parse_args(argv).run
        rows = measure(run)
        result = {"experiment": "forgetting_law", "rows": rows}
        runner.common.write_whole(
            run / "forgetting_law.json", lambda tmp: tmp.write_text(json.dumps(result, indent=1))
        )
        print("\n".join(table(rows)))
        runner.draw(figure, rows, run / "forgetting_law.png")
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


def measure(run):
    """One row per method, and "all": its points, and R² and coefficients of the fits."""
    points = read(run)
    groups = {"all": points}
    for point in points:
        groups.setdefault(point["method"], []).append(point)
    rows = []
    for name, group in groups.items():
        row = {"arm": name, "n": len(group)}
        loss = np.array([point["loss"] for point in group])
        row["loss"] = loss.tolist()
        for direction in KLS:
            x = np.array([point[direction] for point in group])
            row[direction], row[f"R² {direction}"] = x.tolist(), r_squared(x, loss)
        rows.append(row)
    return rows


def read(run):
    """Every trained model of SOURCES: method, KL both ways and loss of prior accuracy."""
    points = []
    for name in SOURCES:
        try:
            result = json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
            start = json.loads((run / "pareto.json").read_text(encoding="utf-8"))["rows"][0]
        except (OSError, ValueError):
            command = f"python -m experiments.{name} --out_dir {run}"
            raise ValueError(f"{run} has no results of {name}; make them: {command}") from None
        for row in result["rows"]:
            metrics, label = row["metrics"], f"{name} {row['arm']}".lower()
            if row["arm"] == "base" or name == "controls" and "sdft" in label:
                continue  # the latter are pareto's
            method = next((METHODS[k] for k in METHODS if k in label), "SDFT")
            for i, prior in enumerate(metrics["prior"]):
                point = {"method": method, "loss": start["metrics"]["prior"][i] - prior}
                points.append(point | {k: metrics[k][i] for k in KLS})
    return points


def r_squared(x, y):
    """The share of y's variance that the best parabola in x explains."""
    fit = np.polyval(np.polyfit(x, y, 2), x)
    return float(1 - np.var(y - fit) / np.var(y))


def table(rows):
    yield "| method | models | R², KL(model ‖ base) | R², KL(base ‖ model) |"
    yield "|---|---:|---:|---:|"
    for row in rows:
        yield f"| {row['arm']} | {row['n']} | {row['R² KL']:.2f} | {row['R² KL forward']:.2f} |"


def claims(at):
    fits = [at("all", f"R² {direction}") for direction in KLS]
    shown = "R² {:.2f} with KL(model ‖ base), {:.2f} with KL(base ‖ model)".format(*fits)
    yield (
        "forgetting follows the KL to the base on the new prompts (R² of a parabola above .7)",
        "not in the paper; RL's Razor: .96 in a toy, .71 on language models",
        shown,
        "yes" if max(fits) > 0.7 else "no",
    )


def figure(rows, plt):
    drawn, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    labels = {"KL": "KL(model ‖ base)", "KL forward": "KL(base ‖ model)"}
    for panel, direction in zip(panels, KLS):
        for row in rows[1:]:
            panel.plot(row[direction], row["loss"], "o", markersize=3, label=row["arm"], alpha=0.7)
        panel.set_xlabel(labels[direction])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss of prior accuracy")
    runner.grid_and_legend(panels[1])
    return drawn


if __name__ == "__main__":
    main()
