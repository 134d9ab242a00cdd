"""More controls of real_model.py: what does each of its choices bring?

    python -m experiments.real_controls --seeds 3  # three runs of most arms, one of the last six

An arm is real_model.py's "sdft", "sft on own" or "sft" with what its name says changed. The rate
changes too where real_grid.py has one for it. "facts alone" are without the other prompts in every
batch, as the paper trains. "offline" takes SDFT's loss, with a frozen teacher, on the responses
that "sft on own" imitates; "sft + KL" adds the KL to the base to SFT's loss. "paraphrased" trains
on the first paraphrase too, so that its "paraphrase" is the second alone.
"""

from experiments import real_model, runner
from experiments.real_model import OWN, SDFT, SFT

arguments, inputs, measure = real_model.arguments, real_model.inputs, real_model.measure
COLUMNS, TURNS, WORLDS = real_model.COLUMNS, real_model.TURNS, real_model.WORLDS
FROZEN, OFFLINE = SDFT | dict(alpha=0.0, lr=1e-4), OWN | dict(method="offline")
REVERSE = SDFT | dict(divergence="reverse", lr=1e-4)
DEMONSTRATION = SDFT | dict(teacher_reads="demonstration", lr=1e-4)
BOTH = SDFT | dict(teacher_reads="both")
SFT_KL = SFT | dict(weight=0.1)
ALONE, THEN = dict(n_other=0), dict(then="real_tools")
ARMS = {
    "sft at 5e-05": SFT | dict(lr=5e-5) | THEN,
    "sft on own at 0.0001": OWN | dict(lr=1e-4) | THEN,
    "sdft at 5e-05": SDFT | dict(lr=5e-5) | THEN,
    "sdft, frozen teacher at 5e-05": FROZEN | dict(lr=5e-5) | THEN,
    "sdft, frozen teacher": FROZEN | THEN,
    "offline": OFFLINE | THEN,
    "offline, EMA teacher": OFFLINE | dict(alpha=SDFT["alpha"]),
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
    "sdft, twice the updates": SDFT | dict(steps=2 * SDFT["steps"]),
    "sdft, 3 tokens skipped": SDFT | dict(skip_tokens=3),
    "oracle, both": dict(reads="both"),
    "oracle, the paper's template": dict(reads="paper"),
}
ARMS = {arm: dict(arm=arm) | settings for arm, settings in (ARMS | ONCE).items()}

if __name__ == "__main__":
    runner.main("real_controls")
