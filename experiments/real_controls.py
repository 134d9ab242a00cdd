"""More controls of real_model.py: what does each of its choices bring?

    python -m experiments.real_controls --seeds 3  # three runs of every arm, one of the last two

Every arm is real_model.py's "sdft", "sft on own" or "sft" with one thing changed. "facts alone" are
without the other prompts in every batch. "offline" takes SDFT's loss on the responses that "sft on
own" imitates, "sft + KL" adds the KL to the base to SFT's loss. Rates are from real_grid.py where
the change is in the loss or the teacher, else those of real_model.py. "paraphrased" trains on the
first paraphrase too, so that its "paraphrase" is the second alone.
"""

from experiments import real_model, runner
from experiments.real_model import OWN, SDFT, SFT

arguments, inputs, measure = real_model.arguments, real_model.inputs, real_model.measure
COLUMNS, TURNS, WORLDS = real_model.COLUMNS, real_model.TURNS, real_model.WORLDS
FROZEN = SDFT | dict(alpha=0.0)
OFFLINE = OWN | dict(method="offline", lr=5e-5)
REVERSE = SDFT | dict(divergence="reverse")
DEMONSTRATION, BOTH = SDFT | dict(teacher_reads="demonstration"), SDFT | dict(teacher_reads="both")
SFT_KL = SFT | dict(weight=0.1)
ALONE, THEN = dict(n_other=0), dict(then="real_tools")
ARMS = {
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
    "sdft, 3 tokens skipped": SDFT | dict(skip_tokens=3),
    "sdft, twice the updates": SDFT | dict(steps=2 * SDFT["steps"]),
    "sdft, batches of 16": SDFT | dict(batch_size=16, n_other=4),
    "sdft, embeddings trained": SDFT | dict(embeddings=True),
    "sdft, paraphrased": SDFT | dict(paraphrased=True),
}
ONCE = {"oracle, both": dict(reads="both"), "oracle, the paper's template": dict(reads="paper")}
ARMS = {arm: dict(arm=arm) | settings for arm, settings in (ARMS | ONCE).items()}

if __name__ == "__main__":
    runner.main("real_controls")
