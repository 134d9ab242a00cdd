"""How much every method trains: one grid for all, and what was chosen from it.

All get 160 updates of 32 prompts, at every rate of RATES. What a method gets in the experiments on
skill X was chosen by `chosen` from the sweep of experiments/pareto.py, for other worlds and other
demonstrations from sweeps of their own, always on validation inputs. A test holds the constants to
the committed sweeps.
"""

import numpy as np

from train_toy import sdft_step, sft_step

STEPS = 160
RATES = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)
LOW, MIDDLE, HIGH = RATES[1:3], RATES[1:4], RATES[2:]  # where a method's best is known to lie
SFT = dict(step=sft_step, style="expert", lr=2e-3, steps=STEPS)
SFT_OWN = dict(step=sft_step, style="own", lr=6e-5, steps=STEPS)
SDFT = dict(step=sdft_step, lr=6e-5, steps=STEPS)
SDFT_FORWARD = dict(step=sdft_step, divergence="forward", lr=6e-5, steps=STEPS)
SDFT_JSD = dict(step=sdft_step, divergence="jsd", lr=6e-5, steps=STEPS)


def grid(families):
    """Every family of arms at every rate: {"sft at 0.001": settings}.

    A family's own "rates" are among its settings, otherwise it gets all of RATES.
    """
    return {
        f"{name} at {lr:g}": dict(steps=STEPS)
        | {k: v for k, v in family.items() if k != "rates"}
        | dict(lr=lr)
        for name, family in families.items()
        for lr in family.get("rates", RATES)
    }


def chosen(rows, new="val new", prior="val prior"):
    """The best arm of every family in a sweep's rows, {"sft": "sft at 0.001"}.

    Of the arms within 0.02 of the family's highest mean of the metric `new`, the one with the
    highest mean of the metric `prior`.
    """
    families = {}
    for row in rows:
        if " at " in row["arm"]:
            means = [np.mean(row["metrics"][name]) for name in (new, prior)]
            families.setdefault(row["arm"].split(" at ")[0], {})[row["arm"]] = means
    best = {}
    for family, arms in families.items():
        highest = max(new_mean for new_mean, _ in arms.values())
        candidates = [arm for arm in arms if arms[arm][0] >= highest - 0.02]
        best[family] = max(candidates, key=lambda arm: arms[arm][1])
    return best
