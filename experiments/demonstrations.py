"""Demonstrations: how many does it take, what do bad ones do, and bare answers?

    python -m experiments.demonstrations --seeds 5

demonstrations  8 to 400 of them, on skill X; 160 updates for every number
mismatch        a share of them is spoiled, see `spoil` in worlds.py. "teacher, training" is the
                final teacher's accuracy with the training's, spoiled ones included
reasoning       With prompts of 5 digits, whose answers are three reasoning steps and a result, they
                hold the result only, `i.`, or in the model's own style `8.`. An answer counts if it
                ends and its last token is the result, with reasoning (5 tokens) or without (2)

README.md, "Few demonstrations", "Bad demonstrations" and "Answer-only demonstrations".
"""

import itertools

import numpy as np

from experiments import common, runner, tables
from experiments.common import on_texts
from experiments.settings import LOW, METHODS, RATES, SDFT, chosen, grid


def figure(rows, plt):
    rows = chosen(rows[1:], DEMONSTRATIONS.choose_by)
    return tables.new_and_prior(rows, plt, "n", "demonstrations")


RATES_OF = {"sft": (6e-6, *RATES)}
RATES_OF |= dict.fromkeys(["sft, own style", "sdft", "sdft, forward KL"], LOW)
NUMBERS = (8, 16, 32, 64, 128, 400)
DEMONSTRATIONS = runner.Experiment(
    name="demonstrations",
    arms=[dict(arm="base"), *(a for n in NUMBERS for a in grid(RATES_OF, condition=f"{n}, ", n=n))],
    measure=common.measure,
    columns=["new", "sampled", "prior", "KL"],
    figure=figure,
)


METHODS = METHODS | {"offline": SDFT | dict(method=on_texts)}
SUFFIXES = {"sdft": "", "sdft, forward KL": ", forward KL", "offline": ", offline"}
SUFFIXES |= {"sft, own style": ", sft in own style"}
SPOILED = [("wrong", family) for family in SUFFIXES]
SPOILED += [("another row's", "sdft"), ("one for all", "sdft")]
ARMS = [dict(arm=f"none{s}", family=f, settings=METHODS[f]) for f, s in SUFFIXES.items()]
for (kind, family), share in itertools.product(SPOILED, (0.2, 1.0)):
    fields = dict(family=family, spoiled=[kind, share], settings=METHODS[family])
    ARMS += [dict(arm=f"{share:.0%} {kind}{SUFFIXES[family]}") | fields]
MISMATCH = runner.Experiment(
    name="mismatch",
    arms=ARMS,
    measure=common.measure,
    columns=["new", "prior", "sampled", "teacher, training", "KL"],
)

# --- Bare answers --------------------------------------------------------------------------------


def derive(metrics):
    metrics["base"][".95 of the length"] = 0.95 * np.array(metrics["base"]["length"])


WORLD = dict(world="long", lenient=True)
SHORT = {"sft, own style": METHODS["sft, own style"] | dict(style="short, own")}
SHORT |= {k: METHODS[k] | dict(style="short") for k in ("sft", "sdft", "sdft, forward KL")}
REASONING = runner.Experiment(
    name="reasoning",
    arms=[dict(arm="base", **WORLD), *grid(dict.fromkeys(SHORT, RATES), SHORT, **WORLD)],
    measure=common.measure,
    columns=["new", "sampled", "prior", "length"],
    bases=[dict(world="long")],
    derive=derive,
)

if __name__ == "__main__":
    runner.main(__doc__, DEMONSTRATIONS, MISMATCH, REASONING)
