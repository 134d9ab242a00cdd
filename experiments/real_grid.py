"""The learning rates of real_model.py and its controls, on facts that these do not report.

    python -m experiments.real_grid --seeds 1

24 other facts, 46 other prior questions, one seed; three rates for every method, about the one that
a first trial of it used, and three weights for "sft + KL" at SFT's rate. Chosen is the highest
prior accuracy of those with nine tenths of the new facts, and if none has them, the most new facts.
The paper chooses among three rates by accuracy on the new task alone.
"""

import copy

from experiments import real_model, runner
from experiments.common import options
from experiments.real_controls import BOTH, DEMONSTRATION, FROZEN, OFFLINE, REVERSE
from experiments.real_model import OWN, SDFT, SFT, answers, learn, load, load_rows, questions, share

arguments, inputs = real_model.arguments, real_model.inputs
RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
FAMILIES = {  # settings, and which of the rates
    "sdft": (SDFT, RATES[:3]),
    "sdft, frozen teacher": (FROZEN, RATES[:3]),
    "sdft, reverse KL": (REVERSE, RATES[1:]),
    "sdft, demonstration": (DEMONSTRATION, RATES[:3]),
    "sdft, both": (BOTH, RATES[:3]),
    "sft on own": (OWN, RATES[1:]),
    "sft": (SFT, RATES[:3]),
    "offline": (OFFLINE, RATES[:3]),
}
ARMS = {
    f"{name} at {lr:g}": dict(settings=settings | dict(lr=lr))
    for name, (settings, rates) in FAMILIES.items()
    for lr in rates
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
    student, teacher = copy.deepcopy(base), copy.deepcopy(base)
    for _ in learn(student, teacher, tokenizer, facts, seed, **settings):
        pass
    asked = questions(facts, prior)
    return {name: share(answers(student, tokenizer, asked[name])) for name in COLUMNS}


def chosen(rows):
    """The chosen arm of every method, {"sft": "sft at 5e-05"}; of equals the first."""
    best = {}
    for row in rows:
        family, [new], [prior] = row["arm"].split(" at ")[0], *map(row["metrics"].get, COLUMNS)
        knows = new >= real_model.MATCHED
        score = knows, prior if knows else new
        if family not in best or score > best[family][1]:
            best[family] = row["arm"], score
    return {family: arm for family, (arm, _) in best.items()}


if __name__ == "__main__":
    runner.main("real_grid")
