"""The learning rates of real_model.py and its controls, on facts that these do not report.

    python -m experiments.real_grid --seeds 1

24 other facts, 46 other prior questions, one seed; two rates for every method, of which the first
is reported, and three weights for "sft + KL". Chosen is the highest prior accuracy of those with
nine tenths of the new facts. The paper chooses among three rates by accuracy on the new task alone.
"""

import copy

from experiments import real_model, runner
from experiments.common import options
from experiments.real_controls import OFFLINE
from experiments.real_model import OWN, SDFT, SFT, answers, learn, load, load_rows, questions, share

arguments, inputs = real_model.arguments, real_model.inputs
FAMILIES = {"sdft": SDFT, "sft on own": OWN, "sft": SFT, "offline": OFFLINE}
RATES = {"sdft": (5e-5, 1e-4), "sft on own": (1e-4, 5e-5), "sft": (5e-5, 2.5e-5)}
RATES["offline"] = RATES["sdft"]
ARMS = {
    f"{name} at {lr:g}": dict(settings=settings | dict(lr=lr))
    for name, settings in FAMILIES.items()
    for lr in RATES[name]
}
WEIGHTS = (0.1, 0.3, 1.0)
ARMS |= {f"sft + KL at weight {w:g}": dict(settings=SFT | dict(weight=w)) for w in WEIGHTS}
COLUMNS = ["new", "prior"]
WORLDS = []


def measure(seed, settings):
    base, tokenizer = load(options.model)
    facts, prior = load_rows("real_facts_val"), load_rows("real_prior_val")
    if options.quick:
        settings = settings | dict(steps=2)
    student = copy.deepcopy(base)
    for _ in learn(student, base, tokenizer, facts, seed, **settings):
        pass
    asked = questions(facts, prior)
    return {name: share(answers(student, tokenizer, asked[name])) for name in COLUMNS}


def chosen(rows):
    """The chosen arm of every method, {"sft": "sft at 5e-05"}; of equals the first."""
    best = {}
    for row in rows:
        family, [new], [prior] = row["arm"].split(" at ")[0], *map(row["metrics"].get, COLUMNS)
        if new >= real_model.MATCHED and prior > best.get(family, ("", 0))[1]:
            best[family] = row["arm"], prior
    return {family: arm for family, (arm, _) in best.items()}


if __name__ == "__main__":
    runner.main("real_grid")
