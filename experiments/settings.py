"""How much every method trains: one grid for all, and what was chosen from it.

What a method gets in all experiments on skill X was chosen by `chosen` from the sweep of experiments/pareto.py, for facts and for answer-only
demonstrations from the sweeps of those, always on validation inputs. A test holds the constants to the committed sweeps.
"""

import numpy as np

from train_toy import sft

GRID = [dict(lr=lr, steps=steps) for steps in (80, 400) for lr in (3e-5, 1e-4, 3e-4, 1e-3)]
SFT = dict(method=sft, style="expert", lr=1e-3, steps=400)
SFT_OWN = dict(method=sft, style="own", lr=3e-4, steps=80)
SDFT = dict(method="sdft", lr=3e-5, steps=400)
SDFT_FORWARD = dict(method="sdft", kl="forward", lr=1e-4, steps=400)
SDFT_FACTS = dict(method="sdft", lr=1e-4, steps=400)


def grid(families):
    """Every family of arms at every point of the grid: {"sft, 400 at 0.001": settings}."""
    return {f"{name}, {g['steps']} at {g['lr']:g}": settings | g for name, settings in families.items() for g in GRID}


def chosen(rows, new, prior):
    """The best arm of every family in a sweep's rows, {"sft": "sft, 400 at 0.001"}: of those within 0.02 of the highest mean of the
    metric `new`, the one with the highest mean of `prior`."""
    means = {r["arm"]: [np.mean(r["metrics"][m]) for m in (new, prior)] for r in rows if " at " in r["arm"]}
    families = {}
    for arm in means:
        families.setdefault(arm.split(", ")[0], []).append(arm)
    best = {family: max(means[arm][0] for arm in arms) for family, arms in families.items()}
    return {
        family: max((arm for arm in arms if means[arm][0] >= best[family] - 0.02), key=lambda arm: means[arm][1])
        for family, arms in families.items()
    }
