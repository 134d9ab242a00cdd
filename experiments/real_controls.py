"""The learning rates of real_model.py, and its controls: what does each of its choices bring?

    python -m experiments.real_controls real_grid --seeds 1
    python -m experiments.real_controls real_controls --seeds 3  # the last six arms on one seed

The grid has three rates for every method, about the one that a first trial of it used, and three
weights for "sft + KL" at SFT's rate. Chosen is the highest prior accuracy of those with nine tenths
of the new facts, and if none has them, the most new facts; of equals the lower rate. The paper
chooses among three rates by accuracy on the new task alone.

The controls are real_model.py's arms with what their names say changed, and the rate too where the
grid has one. "facts alone" are without the other prompts in every batch, as the paper trains.
"offline" takes SDFT's loss, with a frozen teacher, on the responses that "sft on own" imitates;
"sft + KL" adds the KL to the base to SFT's loss. "paraphrased" trains on the first paraphrase too,
and its "paraphrase" is the second alone.
"""

from dataclasses import replace

from experiments import runner
from experiments.real_model import OWN, REAL_MODEL, SDFT, SFT, arm

FROZEN = SDFT | dict(alpha=0.0, lr=1e-4)
REVERSE = SDFT | dict(divergence="reverse", lr=1e-4)
DEMONSTRATION = SDFT | dict(teacher_reads="demonstration", lr=1e-4)
BOTH = SDFT | dict(teacher_reads="article and demonstration")
OFFLINE = OWN | dict(method="offline")
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
GRID = [
    (family, f"{family} at {lr:g}", fields | dict(lr=lr))
    for family, (fields, rates) in FAMILIES.items()
    for lr in rates
]
WEIGHTS = (0.1, 0.3, 1.0)
GRID += [("sft + KL", f"sft + KL at weight {w:g}", SFT | dict(kl_weight=w)) for w in WEIGHTS]
GRID = [
    dict(arm=label, name=f"grid, {label}", family=family, split="_val", **fields)
    for family, label, fields in GRID
]

THEN, ALONE = dict(then="tools"), dict(n_other=0)
CONTROLS = [
    arm("sft at 5e-05", **SFT | dict(lr=5e-5) | THEN),
    arm("sft on own at 0.0001", **OWN | dict(lr=1e-4) | THEN),
    arm("sdft at 5e-05", **SDFT | dict(lr=5e-5) | THEN),
    arm("sdft, frozen teacher at 5e-05", **FROZEN | dict(lr=5e-5) | THEN),
    arm("sdft, frozen teacher", **FROZEN | THEN),
    arm("offline", **OFFLINE | THEN),
    arm("offline, EMA teacher", **OFFLINE | dict(alpha=0.02)),
    arm("sft + KL", **SFT_KL),
    arm("sft, facts alone", **SFT | ALONE),
    arm("sft on own, facts alone", **OWN | ALONE),
    arm("sdft, facts alone", **SDFT | ALONE),
    arm("sdft, reverse KL", **REVERSE),
    arm("sdft, demonstration", **DEMONSTRATION),
    arm("sdft, both", **BOTH),
    arm("sdft, temperature 1", **SDFT | dict(temperature=1.0)),
]
ONCE = [
    arm("sdft, paraphrased", **SDFT | dict(paraphrased=True)),
    arm("sdft, batches of 16", **SDFT | dict(batch_size=16, n_other=4)),
    arm("sdft, twice the updates", **SDFT | dict(steps=224)),
    arm("sdft, 3 tokens skipped", **SDFT | dict(skip_tokens=3)),
    arm("oracle, both", reads="article and demonstration"),
    arm("oracle, the paper's template", reads="paper"),
]

GRID_ONLY = dict(columns=["new", "prior"], then_columns=(), quick=("sft at 5e-05",))
REAL_GRID = replace(REAL_MODEL, name="real_grid", arms=GRID, figure=None, **GRID_ONLY)
ONLY = dict(once=[row["arm"] for row in ONCE], quick=("sft at 5e-05",))
REAL_CONTROLS = replace(REAL_MODEL, name="real_controls", arms=CONTROLS + ONCE, figure=None, **ONLY)

if __name__ == "__main__":
    runner.main(__doc__, REAL_GRID, REAL_CONTROLS)
