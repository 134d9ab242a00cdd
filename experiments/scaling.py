"""Does it need in-context learning, and so size?

    python -m experiments.scaling --seeds 5

Models of several depths and widths, pretrained on the same number of tokens with the same settings.
"teacher" is the base's accuracy with a demonstration: the paper's reason can be tested only if it
differs between the sizes. README.md, "Size".
"""

import numpy as np

from experiments import common, runner
from experiments.settings import HIGH, RATES, grid


def derive(metrics):
    for size in SIZES:
        sdft, sft = (np.array(metrics[f"{size}, {arm}"]["new"]) for arm in ("sdft", "sft"))
        metrics[f"{size}, gap"] = {"new": sdft - sft}
    worst = min(np.mean(metrics[f"{size}, base"]["teacher"]) for size in SIZES)
    metrics["worst of all sizes"] = {"teacher": [worst]}


SIZES = {f"{d} x {w}": dict(n_layer=d, n_embd=w) for d, w in ((1, 128), (2, 32), (2, 64), (2, 128))}
ARMS = [dict(arm=f"{size}, base", **fields) for size, fields in SIZES.items()]
RATES_OF = {"sft": HIGH[1:], "sdft": RATES[:4]}
ARMS += [a for s, fields in SIZES.items() for a in grid(RATES_OF, condition=f"{s}, ", **fields)]
SCALING = runner.Experiment(
    name="scaling",
    arms=ARMS,
    measure=common.measure,
    columns=["new", "prior", "sampled", "teacher"],
    derive=derive,
    bases=[*reversed(SIZES.values())],
    choose_by=("val new", "val prior"),
)

if __name__ == "__main__":
    runner.main(__doc__, SCALING)
