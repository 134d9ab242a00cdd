"""Finished runs of train_toy.py over several seeds as one table and one figure.

    for seed in 0 1 2 3 4; do python train_toy.py --seed $seed --out_dir out/$seed; done
    python -m experiments.seeds out/[0-4]              # --figure FILE draws it

Greedy accuracy on unseen inputs, mean ± standard deviation over the runs, and the worst run. "own"
is a skill right after its own stage. "kept" is the paper's unit (Fig. 3) after the last stage: 0 is
the base, 1 the best of both methods after the skill's own stage.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from experiments import report

SKILLS = ["X", "Y", "Z"]
COLUMNS = [*SKILLS, "prior"]


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
    """{method: accuracies (runs, stages, COLUMNS), the base first} of runs that differ in the seed.

    Raises ValueError if they differ in more.
    """
    runs, settings = {"sft": [], "sdft": []}, []
    for folder in folders:
        try:
            result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            for method, of_method in runs.items():
                stages = [result["base"], *result[method]]
                assert len(stages) == 1 + len(SKILLS)
                of_method.append([[row[c] for c in COLUMNS] for row in stages])
            settings.append(result["config"])
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            raise ValueError(f"{folder} holds no results.json of a finished toy run") from None
        for name in ("seed", "out_dir", "base", "threads", "torch", "device", "machine"):
            settings[-1].pop(name, None)
        if settings[-1] != settings[0]:
            raise ValueError(f"{folder} and {folders[0]} differ in more than the seed")
    return {method: np.array(of_method) for method, of_method in runs.items()}


def table(runs):
    """Lines of Markdown."""
    yield "| | base | SFT | SDFT | worst SFT | worst SDFT |"
    yield "|---" + "|---:" * 5 + "|"
    base = runs["sft"][:, 0]  # (runs, COLUMNS)
    for i, c in enumerate(COLUMNS):
        end = [arm[:, -1, i] for arm in runs.values()]
        if c in SKILLS:
            own = [arm[:, i + 1, i] for arm in runs.values()]
            yield row(f"{c}, own", own, base[:, i])
        yield row(f"{c} at the end", end, base[:, i])
        if c in SKILLS:
            gain = np.maximum(*own) - base[:, i]
            gain[gain <= 0] = np.nan  # nothing was learned
            yield row(f"{c} kept", [(values - base[:, i]) / gain for values in end])


def row(name, values, base=()):
    cells = [*map(report.mean_and_spread, (base, *values)), *(f"{v.min():.2f}" for v in values)]
    cells = ["–" if "nan" in cell else cell for cell in cells]
    return f"| {name} | " + " | ".join(cells) + " |"


def figure(runs, plt):
    """Greedy accuracy after every stage: SFT on the left, SDFT on the right."""
    panels = {method.upper(): dict(zip(COLUMNS, values.T)) for method, values in runs.items()}
    return report.panels_of_lines(plt, panels, ["base", *(f"after {c}" for c in SKILLS)])


if __name__ == "__main__":
    main()
