"""The base: how often must it be right already, and how large must it be?

    python -m experiments.bases --seeds 5

cold_start  Five skills of which the base's training followed the right table on 0, 3, 10, 30 and 60
            of 100 prompts, otherwise the rival's; which skill has which level changes with the
            seed. (Next to a bare answer, in 2% of its lines, the right table is followed always.)
scaling     Skill X, models of several depths and widths, pretrained on the same number of tokens
            with the same settings. "teacher" is the base's accuracy with a demonstration: the
            paper's reason can be tested only if it differs between the sizes

README.md, "Cold start" and "Size".
"""

import numpy as np

from experiments import common, runner, tables
from experiments.settings import HIGH, LOW, chosen, grid
from experiments.worlds import COLD, cold_skills

# --- Cold start ----------------------------------------------------------------------------------


def measure(seed, level, settings=None):
    name = {p: name for name, p in cold_skills(seed).items()}[level]
    return common.measure(seed, settings, name)


def figure(rows, plt):
    rows = chosen(rows, COLD_START.choose_by)
    return tables.new_and_prior(rows, plt, "level", "how often the base's training was right")


LEVELS = [*COLD.values()]
RATES_OF = dict.fromkeys(["sft", "sdft", "sdft, forward KL", "sdft, JSD"], HIGH)
ARMS = [dict(arm=f"{p:g}, base", family="base", level=p) for p in LEVELS]
ARMS += [arm for p in LEVELS for arm in grid(RATES_OF, condition=f"{p:g}, ", level=p)]
COLD_START = runner.Experiment(
    name="cold_start",
    arms=ARMS,
    measure=measure,
    columns=["new", "sampled", "prior"],
    figure=figure,
)


# --- Size ----------------------------------------------------------------------------------------


def derive(metrics):
    for size in SIZES:
        sdft, sft = (np.array(metrics[f"{size}, {arm}"]["new"]) for arm in ("sdft", "sft"))
        metrics[f"{size}, gap"] = {"new": sdft - sft}
    worst = min(np.mean(metrics[f"{size}, base"]["teacher"]) for size in SIZES)
    metrics["worst of all sizes"] = {"teacher": [worst]}


SIZES = {f"{d} x {w}": dict(n_layer=d, n_embd=w) for d, w in ((1, 128), (2, 32), (2, 64), (2, 128))}
SIZE_ARMS = [dict(arm=f"{size}, base", **fields) for size, fields in SIZES.items()]
for size, fields in SIZES.items():
    SIZE_ARMS += grid({"sft": HIGH, "sdft": LOW}, condition=f"{size}, ", **fields)
SCALING = runner.Experiment(
    name="scaling",
    arms=SIZE_ARMS,
    measure=common.measure,
    columns=["new", "prior", "sampled", "teacher"],
    derive=derive,
    bases=[*reversed(SIZES.values())],
)

if __name__ == "__main__":
    runner.main(__doc__, COLD_START, SCALING)
