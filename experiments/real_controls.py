"""The learning rates of real_model.py, and its controls: what does each of its choices bring?

    python -m experiments.real_controls real_grid --seeds 1
    python -m experiments.real_controls real_controls --seeds 3  # the last seven arms on one seed
    python -m experiments.real_controls two_by_two --seeds 5

Of the grid's rates, and the weights of "sft + KL", those with nine tenths of the new facts compete
by prior accuracy, and if there are none, all by the new facts; of equals the lower is chosen. The
paper chooses by accuracy on the new task alone.

The controls are real_model.py's arms with what their names say changed, and the rate too where the
grid has one. "facts alone" are without the other prompts in every batch, as the paper trains;
"offline" takes SDFT's loss, with a frozen teacher, on the responses that "sft on own" imitates;
"cpt" learns the articles as plain text.

two_by_two crosses on-policy and offline with an EMA and a frozen teacher, beside two kinds of SFT,
all with as many updates at the middle rate of the grid, and without a second task. It asks more
prior questions, those that the base answers.
"""

from dataclasses import replace

from experiments import runner
from experiments.real_model import OWN, REAL_MODEL, SDFT, SFT, THEN, as_rows

FROZEN = SDFT | dict(alpha=0.0, lr=1e-4)
REVERSE = SDFT | dict(divergence="reverse", lr=1e-4)
DEMONSTRATION = SDFT | dict(teacher_reads="demonstration", lr=1e-4)
BOTH = SDFT | dict(teacher_reads="article and demonstration")
OFFLINE = OWN | dict(method="offline")
OFFLINE_EMA = OFFLINE | dict(alpha=0.02)
SFT_KL = SFT | dict(kl_weight=0.1)

RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
FAMILIES = {
    "sdft": (SDFT, RATES[:3]),
    "sdft, frozen teacher": (FROZEN, RATES[:3]),
    "sdft, reverse KL": (REVERSE, RATES[1:]),
    "sdft, demonstration": (DEMONSTRATION, RATES[:3]),
    "sdft, both": (BOTH, RATES[:3]),
    "sft on own": (OWN, RATES[1:]),
    "sft": (SFT, RATES[:3]),
    "offline": (OFFLINE, RATES[:3]),
}
GRID = {
    f"{family} at {lr:g}": fields | dict(lr=lr, family=family)
    for family, (fields, rates) in FAMILIES.items()
    for lr in rates
}
for w in (0.1, 0.3, 1.0):
    GRID[f"sft + KL at weight {w:g}"] = SFT | dict(kl_weight=w, family="sft + KL")

ALONE = dict(n_other=0)
CONTROLS = {
    "sft at 5e-05": SFT | dict(lr=5e-5) | THEN,
    "sft on own at 0.0001": OWN | dict(lr=1e-4) | THEN,
    "sdft at 5e-05": SDFT | dict(lr=5e-5) | THEN,
    "sdft, frozen teacher at 5e-05": FROZEN | dict(lr=5e-5) | THEN,
    "sdft, frozen teacher": FROZEN | THEN,
    "offline": OFFLINE | THEN,
    "offline, EMA teacher": OFFLINE_EMA,
    "sft + KL": SFT_KL,
    "sft, facts alone": SFT | ALONE,
    "sft on own, facts alone": OWN | ALONE,
    "sdft, facts alone": SDFT | ALONE,
    "sdft, reverse KL": REVERSE,
    "sdft, demonstration": DEMONSTRATION,
    "sdft, both": BOTH,
    "sdft, temperature 1": SDFT | dict(temperature=1.0),
}
ONCE = {
    "sdft, paraphrased": SDFT | dict(paraphrased=True),
    "sdft, batches of 16": SDFT | dict(batch_size=16, n_other=4),
    "sdft, twice the updates": SDFT | dict(steps=224),
    "sdft, 3 tokens skipped": SDFT | dict(skip_tokens=3),
    "cpt": SFT | dict(method="cpt"),
    "oracle, both": dict(reads="article and demonstration"),
    "oracle, the paper's template": dict(reads="paper"),
}

SIX = {"sft": SFT, "sft on own responses": OWN, "offline, frozen": OFFLINE}
SIX |= {"offline, EMA": OFFLINE_EMA, "sdft, frozen": FROZEN, "sdft": SDFT}

SHORT = dict(columns=["new", "prior"], then_columns=(), figure=None, quick=("sft at 5e-05",))
GRID = as_rows(GRID, "grid, ", split="_val")
REAL_GRID = replace(REAL_MODEL, name="real_grid", arms=GRID, **SHORT)
ONLY = dict(once=[*ONCE], figure=None, quick=("sft at 5e-05",))
REAL_CONTROLS = replace(REAL_MODEL, name="real_controls", arms=as_rows(CONTROLS | ONCE), **ONLY)
COLUMNS = ["new", "prior", "prior at .90", "updates to .90", "KL prior", "prior questions"]
ONLY = dict(columns=COLUMNS, then_columns=(), figure=None, quick=("sft", "sdft"))
SIX = as_rows(SIX, "two_by_two, ", lr=5e-5, steps=112, many=True)
TWO_BY_TWO = replace(REAL_MODEL, name="two_by_two", arms=SIX, **ONLY)

if __name__ == "__main__":
    runner.main(__doc__, REAL_GRID, REAL_CONTROLS, TWO_BY_TWO)
