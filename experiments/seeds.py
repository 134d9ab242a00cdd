"""Finished runs of train_toy.py over several seeds as one table and one figure.

    for seed in 0 1 2 3 4; do python train_toy.py --seed $seed --out_dir out/$seed; done
    python -m experiments.seeds out/[0-4]              # --figure FILE draws it

Greedy accuracy on unseen inputs, mean ± standard deviation over the runs, and the worst run. "own"
is a skill right after its own stage. "kept" is the paper's unit (Fig. 3) after the last stage: 0 is
the base, 1 the best of both methods after the skill's own stage.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

from experiments import report
from experiments.report import mean_and_spread

STAGES = ["base", "X", "Y", "Z"]
COLUMNS = ["X", "Y", "Z", "prior"]


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", type=Path, nargs="+", help="--out_dir of finished runs, one per seed")
    p.add_argument("--figure", type=Path, help="draw the accuracies after every stage")
    args = p.parse_args(argv)
    try:
        runs = read(args.runs)
        print("\n".join(table(runs)))
        if args.figure:
            report.draw(figure, runs, args.figure)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


def read(folders):
    """The results of runs that differ in nothing but the seed."""
    runs = []
    for folder in folders:
        try:
            runs.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
            for arm in ("sft", "sdft"):
                assert [row["after"] for row in runs[-1][arm]] == STAGES[1:]
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            raise ValueError(f"{folder} holds no results.json of a finished toy run") from None
    varying = ("seed", "out_dir", "base", "threads", "torch", "device")
    settings = [{k: v for k, v in run["config"].items() if k not in varying} for run in runs]
    for folder, other in zip(folders, settings):
        if other != settings[0]:
            raise ValueError(f"{folder} and {folders[0]} differ in more than the seed")
    return runs


def accuracies(runs, arm):
    """Of every run after every stage, the base first: (runs, stages, COLUMNS)."""
    rows = [[run["base"], *run[arm]] for run in runs]
    return np.array([[[row[c] for c in COLUMNS] for row in stages] for stages in rows])


def table(runs):
    """Lines of Markdown."""
    sft, sdft = accuracies(runs, "sft"), accuracies(runs, "sdft")  # (runs, stages, COLUMNS)
    base = sft[:, 0]  # (runs, COLUMNS)
    yield "| | base | SFT | SDFT | worst SFT | worst SDFT |"
    yield "|---" + "|---:" * 5 + "|"
    for i, c in enumerate(COLUMNS[:3]):
        own = [arm[:, i + 1, i] for arm in (sft, sdft)]
        end = [arm[:, -1, i] for arm in (sft, sdft)]
        best = np.maximum(*own)
        # Undefined if nothing was learned.
        gain = np.where(best > base[:, i], best - base[:, i], np.nan)
        yield row(f"{c}, own", own, base[:, i])
        yield row(f"{c} at the end", end, base[:, i])
        yield row(f"{c} kept", [(values - base[:, i]) / gain for values in end])
    yield row("prior at the end", [arm[:, -1, 3] for arm in (sft, sdft)], base[:, 3])


def row(name, values, base=()):
    cells = [mean_and_spread(base), *map(mean_and_spread, values)]
    cells += [f"{v.min():.2f}" for v in values]
    cells = [re.sub("nan( ± nan)?", "–", cell) for cell in cells]
    return f"| {name} | " + " | ".join(cells) + " |"


def figure(runs, plt):
    """Greedy accuracy after every stage: SFT on the left, SDFT on the right."""
    drawn, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    colours = ("tab:blue", "tab:orange", "tab:green", "black")
    for panel, arm in zip(panels, ("sft", "sdft")):
        for values, c, colour in zip(accuracies(runs, arm).T, COLUMNS, colours):  # (stages, runs)
            name, fmt = ("prior skills", "--o") if c == "prior" else (f"skill {c}", "-o")
            report.line(panel, range(4), values, name, fmt, color=colour)
        panel.set_xticks(range(4), ["base", "after X", "after Y", "after Z"])
        panel.set(title=arm.upper(), ylim=(-0.03, 1.05))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("greedy accuracy, unseen inputs")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    return drawn


if __name__ == "__main__":
    main()
