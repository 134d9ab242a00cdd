"""Cold start: how often must the base be right already?

    python -m experiments.cold_start --seeds 5

Five skills of which the base's training followed the right table on 0, 3, 10, 30 and 60 of 100
prompts, otherwise the rival's; which skill has which level changes with the seed. (Next to a bare
answer, in 2% of its lines, the right table is followed always.) README.md, "Cold start".
"""

from experiments import common, report, runner
from experiments.settings import chosen, grid
from experiments.worlds import COLD, cold_skills


def measure(seed, level, settings=None):
    name = {p: name for name, p in cold_skills(seed).items()}[level]
    return common.measure(seed, settings, name)


def figure(rows, plt):
    rows = chosen(rows, COLD_START.choose_by)
    return report.new_and_prior(rows, plt, "level", "how often the base's training was right")


LEVELS = [*COLD.values()]
RATES_OF = dict.fromkeys(["sft", "sdft", "sdft, forward KL", "sdft, JSD"], (2e-4, 6e-4))
RATES_OF["sft"] = (6e-4, 2e-3)
ARMS = [dict(arm=f"{p:g}, base", family="base", level=p) for p in LEVELS]
ARMS += [arm for p in LEVELS for arm in grid(RATES_OF, condition=f"{p:g}, ", level=p)]
COLD_START = runner.Experiment(
    name="cold_start",
    arms=ARMS,
    measure=measure,
    columns=["new", "sampled", "prior"],
    choose_by=("val new", "val prior"),
    figure=figure,
)

if __name__ == "__main__":
    runner.main(__doc__, COLD_START)
