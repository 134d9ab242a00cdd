"""How much every method trains: one grid for all, and what was chosen from it.

All get 160 updates of 32 prompts. What a method gets in the experiments on skill X was chosen by
`chosen` from the sweep of experiments/pareto.py over RATES, for other worlds and other
demonstrations from sweeps of their own, always on validation inputs. A test holds the constants to
the committed sweep.
"""

import numpy as np

from train_toy import sdft, sft

RATES = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)
LOW, HIGH = RATES[:3], RATES[2:]  # where a method's best is known to lie
# "style" is that of the demonstrations. SFT has no use for a teacher: alpha 0 leaves it alone.
SFT = dict(method=sft, style="expert", alpha=0.0, lr=6e-4, steps=160)
SFT_OWN = SFT | dict(style="own", lr=6e-5)
SDFT = dict(method=sdft, style="expert", lr=6e-5, steps=160)
SDFT_FORWARD = SDFT | dict(divergence="forward")
SDFT_JSD = SDFT | dict(divergence="jsd")
METHODS = {"sft": SFT, "sft, own style": SFT_OWN, "sdft": SDFT}
METHODS |= {"sdft, forward KL": SDFT_FORWARD, "sdft, JSD": SDFT_JSD}


def grid(rates, methods=METHODS, condition="", **fields):
    """Arms: every method of {method: its rates} at every rate, under a condition with fields."""
    return [
        dict(arm=condition + family, family=family, rate=lr, **fields)
        | dict(settings=methods[family] | dict(lr=lr))
        for family, several in rates.items()
        for lr in several
    ]


def chosen(rows, choose_by):
    """Of every arm in a sweep's rows the one with the best rate.

    Of the rates within 0.02 of the highest mean of the first metric, mostly "val new", the one with
    the highest mean of the second, mostly "val prior". At the end of its rates it has a field
    "end": a better rate may lie beyond.
    """
    mean = lambda row, metric: np.mean(row["metrics"][metric])
    best = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        if len(of_arm) == 1:
            best += of_arm
            continue
        new, prior = choose_by
        highest = max(mean(row, new) for row in of_arm)
        close = [row for row in of_arm if mean(row, new) >= highest - 0.02]
        row, rates = max(close, key=lambda row: mean(row, prior)), [row["rate"] for row in of_arm]
        best.append(row | {"end": True} if row["rate"] in (min(rates), max(rates)) else row)
    return best
