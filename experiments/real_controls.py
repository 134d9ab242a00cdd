"""More controls of real_model.py: what does each of its choices bring? One run of each.

    python -m experiments.real_controls --seeds 1

"facts alone" are without the other prompts in every batch. "offline" takes SDFT's loss on the
responses that "sft on own" imitates, "sft + KL" adds the KL to the base to SFT's loss. No results
of these are committed; their rates are those of real_model.py.
"""

from experiments import real_model, runner
from experiments.real_model import OWN, SDFT, SFT

arguments, inputs, measure = real_model.arguments, real_model.inputs, real_model.measure
COLUMNS, WORLDS = real_model.COLUMNS, real_model.WORLDS
ALONE = dict(n_other=0)
ARMS = {
    "sdft, facts alone": SDFT | ALONE,
    "sft on own, facts alone": OWN | ALONE,
    "sft, facts alone": SFT | ALONE,
    "offline": OWN | dict(method="offline"),
    "sft + KL": SFT | dict(weight=1.0),
    "sdft, reverse KL": SDFT | dict(divergence="reverse"),
    "sdft, EMA teacher": SDFT | dict(alpha=0.02),
    "sdft, temperature 1": SDFT | dict(temperature=1.0),
    "sdft, demonstration": SDFT | dict(teacher_reads="demonstration"),
    "sdft, both": SDFT | dict(teacher_reads="both"),
    "sdft, embeddings trained": SDFT | dict(fixed=False),
    "oracle, both": dict(reads="both"),
    "oracle, the paper's template": dict(reads="paper"),
}
ARMS = {arm: dict(arm=arm) | settings for arm, settings in ARMS.items()}

if __name__ == "__main__":
    runner.main("real_controls")
