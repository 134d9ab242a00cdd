"""More controls of real_model.py: what does each of its choices bring?

    python -m experiments.real_controls --seeds 3  # three runs of the first six, one of the others

"facts alone" are without the other prompts in every batch. "offline" takes SDFT's loss on the
responses that "sft on own" imitates, "sft + KL" adds the KL to the base to SFT's loss. The EMA
teacher is the paper's; what it knows with the article is measured every 8 updates. The rates of
"offline" and "sft + KL" are from real_grid.py, the others are those of real_model.py.
"""

from experiments import real_model, runner
from experiments.real_model import OWN, SDFT, SFT

arguments, inputs, measure = real_model.arguments, real_model.inputs, real_model.measure
COLUMNS, WORLDS = real_model.COLUMNS, real_model.WORLDS
ALONE, EMA = dict(n_other=0), SDFT | dict(alpha=0.02)
OFFLINE, SFT_KL = OWN | dict(method="offline", lr=5e-5), SFT | dict(weight=0.1)
ARMS = {
    "sdft, facts alone": SDFT | ALONE,
    "sft on own, facts alone": OWN | ALONE,
    "sft, facts alone": SFT | ALONE,
    "sdft, EMA teacher": EMA,
    "sft + KL": SFT_KL,
    "offline": OFFLINE,
}
ONCE = {
    "sdft, reverse KL": SDFT | dict(divergence="reverse"),
    "sdft, demonstration": SDFT | dict(teacher_reads="demonstration"),
    "oracle, both": dict(reads="both"),
    "oracle, the paper's template": dict(reads="paper"),
}
ARMS = {arm: dict(arm=arm) | settings for arm, settings in (ARMS | ONCE).items()}

if __name__ == "__main__":
    runner.main("real_controls")
