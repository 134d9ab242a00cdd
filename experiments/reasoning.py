"""Answer-only demonstrations: does a model that reasons keep reasoning?

    python -m experiments.reasoning --seeds 5

Skill X with prompts of 5 digits, whose answers are three reasoning steps and a result; the
demonstrations hold the result only, `i.`, or in the model's own style `8.`. An answer counts if it ends and its last token is the
correct result, with reasoning (5 tokens) or without (2). README.md, "Answer-only demonstrations".
"""

import numpy as np

from experiments import common, runner
from experiments.settings import HIGH, METHODS, RATES, SFT_OWN, grid


def derive(metrics):
    metrics["base"][".95 of the length"] = 0.95 * np.array(metrics["base"]["length"])


WORLD = dict(world="long", lenient=True)
RATES_OF = {"sft": HIGH, "sft, own style": HIGH, "sdft": RATES[:4], "sdft, forward KL": RATES[:4]}
SHORT = {name: METHODS[name] | dict(style="short") for name in RATES_OF}
SHORT["sft, own style"] = SFT_OWN | dict(style="short, own")
REASONING = runner.Experiment(
    name="reasoning",
    arms=[dict(arm="base", **WORLD), *grid(RATES_OF, SHORT, **WORLD)],
    measure=common.measure,
    columns=["new", "sampled", "prior", "length", "teacher"],
    bases=[dict(world="long")],
    choose_by=("val new", "val prior"),
    derive=derive,
)

if __name__ == "__main__":
    runner.main(__doc__, REASONING)
