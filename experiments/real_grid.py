"""The learning rates of real_model.py and its controls, on facts that these do not report.

    python -m experiments.real_grid --seeds 1

24 other facts, 46 other prior questions, one seed; two rates for every method, of which the first
is reported, and three weights for "sft + KL". Chosen as on the toy (settings.py): of those with the
most new facts, the one with the highest prior accuracy. The paper chooses among three rates by
validation accuracy on the new task.
"""

import copy

from experiments import real_model, runner
from experiments.common import options
from experiments.real_controls import OFFLINE
from experiments.real_model import OWN, SDFT, SFT, answers, learn, load, load_rows, questions, share

arguments, inputs = real_model.arguments, real_model.inputs
FAMILIES = {"sdft": SDFT, "sft on own": OWN, "sft": SFT, "offline": OFFLINE}
RATES = {"sft": (5e-5, 2.5e-5), "sft on own": (1e-4, 5e-5)}
RATES |= dict.fromkeys(("sdft", "offline"), (5e-5, 1e-4))
ARMS = {
    f"{name} at {lr:g}": dict(settings=settings | dict(lr=lr))
    for name, settings in FAMILIES.items()
    for lr in RATES[name]
}
WEIGHTS = (0.1, 0.3, 1.0)
ARMS |= {f"sft + KL at weight {w:g}": dict(settings=SFT | dict(weight=w)) for w in WEIGHTS}
COLUMNS = ["new", "prior"]
WORLDS = []
CHOSEN_BY = ("new", "prior")  # as `settings.chosen` takes them


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


if __name__ == "__main__":
    runner.main("real_grid")
