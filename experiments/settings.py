"""How much every method trains: one grid for all, and what was chosen from it.

What a method gets in all experiments on skill X was chosen by `chosen` from the sweep of
experiments/pareto.py, for facts and for answer-only demonstrations from the sweeps of those,
always on validation inputs. A test holds the constants to the committed sweeps.
"""

import numpy as np

from train_toy import sdft_step, sft_step

GRID = [dict(lr=lr, steps=steps) for steps in (80, 400) for lr in (3e-5, 1e-4, 3e-4, 1e-3)]
SFT = dict(step=sft_step, style="expert", lr=1e-3, steps=400)
SFT_OWN = dict(step=sft_step, style="own", lr=3e-4, steps=80)
SDFT = dict(step=sdft_step, lr=3e-5, steps=400)
SDFT_FORWARD = dict(step=sdft_step, divergence="forward", lr=1e-4, steps=400)
SDFT_FACTS = dict(step=sdft_step, lr=1e-4, steps=400)


def grid(families):
    """Every family of arms at every point of the grid: {"sft, 400 at 0.001": settings}."""
    return {
        f"{name}, {point['steps']} at {point['lr']:g}": settings | point
        for name, settings in families.items()
        for point in GRID
    }


def chosen(rows, new, prior):
    """The best arm of every family in a sweep's rows, {"sft": "sft, 400 at 0.001"}.

    Of the arms within 0.02 of the family's highest mean of the metric `new`, the one with the
    highest mean of the metric `prior`.
    """
    families = {}
    for row in rows:
        if " at " in row["arm"]:
            means = [np.mean(row["metrics"][name]) for name in (new, prior)]
            families.setdefault(row["arm"].split(", ")[0], {})[row["arm"]] = means
    best = {}
    for family, arms in families.items():
        highest = max(new_mean for new_mean, _ in arms.values())
        candidates = [arm for arm in arms if arms[arm][0] >= highest - 0.02]
        best[family] = max(candidates, key=lambda arm: arms[arm][1])
    return best
