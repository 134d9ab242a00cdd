"""The learning rates of real_model.py and its controls, on facts that these do not report.

    python -m experiments.real_grid --seeds 1

24 other facts, 46 other prior questions, one seed; for every method the rate that is reported, half
of it and twice it. Chosen as on the toy (settings.py): of the rates with the most new facts, the
one with the highest prior accuracy. The paper chooses among three rates by validation accuracy on
the new task.
"""

import copy

from experiments import real_controls, real_model, runner
from experiments.common import options
from experiments.real_model import answers, learn, load, load_rows, questions, share

arguments, inputs = real_model.arguments, real_model.inputs
FAMILIES = {
    name: {key: value for key, value in arms[name].items() if key not in ("arm", "then")}
    for arms in (real_model.ARMS, real_controls.ARMS)
    for name in arms
    if name in ("sdft", "sft on own", "sft", "sft + KL", "offline")
}
ARMS = {
    f"{name} at {lr:g}": dict(settings=settings | dict(lr=lr))
    for name, settings in FAMILIES.items()
    for lr in (settings["lr"] / 2, settings["lr"], settings["lr"] * 2)
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
