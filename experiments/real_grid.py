"""The learning rates of real_model.py, chosen on facts and questions that it does not report.

    python -m experiments.real_grid --seeds 1

24 other facts, 46 other prior questions, one seed, three rates for every method, 64 updates beside
the first 24 of the other prompts. The paper chooses among three rates by validation accuracy on the
new task. SDFT's half rate and longer run were chosen after it, on the same facts
(experiments/README.md).
"""

import copy

from experiments import real_model, runner
from experiments.common import options
from experiments.real_model import OWN, SDFT, SFT, answers, learn, load, load_rows, questions, share

arguments, inputs = real_model.arguments, real_model.inputs
FAMILIES = {"sdft": SDFT, "sft on own": OWN, "sft": SFT}
RATES = (5e-5, 1e-4, 2e-4)
LENGTH = dict(steps=64, others=24)
ARMS = {
    f"{name} at {lr:g}": dict(settings=settings | LENGTH | dict(lr=lr))
    for lr in RATES
    for name, settings in FAMILIES.items()
}
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
