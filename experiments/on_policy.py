"""Is it being on-policy, or being close to the base? The baselines that the paper has and lacks.

    python -m experiments.on_policy --seeds 5

on_policy  Skill X with prompts of 3 and of 5 digits, answers of 2 and 4 steps: a long answer can go
           wrong early and has to be answered for later
controls   Everyone trains on the same demonstrations of skill X, each at three rates

README.md, "On-policy or not" and "Controls".
"""

import numpy as np
import torch
import torch.nn.functional as F

from data import toy
from experiments import common, runner
from experiments.common import base, on_texts, sft_on_texts, skill, skill_metrics, train
from experiments.settings import HIGH, LOW, SDFT, SDFT_FORWARD, SFT, grid
from experiments.worlds import N_DIGITS
from sdft import completion_logits, sft_loss, token_divergence
from train_toy import sdft, sft

# --- On-policy or offline ------------------------------------------------------------------------

FAMILIES = {
    "sdft": SDFT,
    "offline": SDFT | dict(method=on_texts),
    "sdft, forward KL": SDFT_FORWARD,
    "offline, forward KL": SDFT_FORWARD | dict(method=on_texts),
    "sft, offline": SDFT | dict(method=sft_on_texts),
}
ARMS = []
for world, n in N_DIGITS.items():
    ARMS += [dict(arm=f"{n} digits, base", family="base", world=world)]
    ARMS += grid(dict.fromkeys(FAMILIES, LOW), FAMILIES, f"{n} digits, ", world=world)
ON_POLICY = runner.Experiment(
    name="on_policy",
    arms=ARMS,
    measure=common.measure,
    columns=["new", "prior", "sampled"],
    bases=[dict(world=world) for world in N_DIGITS],
)


# --- Other ways to stay close --------------------------------------------------------------------


def kl_penalty(student, teacher, batch, generator, weight):
    """SFT with a penalty of weight times KL(student ‖ base), which is the frozen teacher."""
    tokens = torch.from_numpy(batch["demonstrations"])  # (B, C), which all end together
    logits = completion_logits(student, batch["prompts"], tokens)  # (B, C, V)
    with torch.no_grad():
        of_base = completion_logits(teacher, batch["prompts"], tokens)
    penalty = token_divergence(logits, of_base).mean()
    return sft_loss(logits, tokens, torch.ones_like(tokens)) + weight * penalty


def replay(student, teacher, batch, generator):
    """SFT on the demonstrations and on as many right answers to prompts of prior skills."""
    prior = batch | dict(prompts=batch["prior_prompts"], demonstrations=batch["prior_answers"])
    return (sft(student, teacher, batch, generator) + sft(student, teacher, prior, generator)) / 2


def dft(student, teacher, batch, generator):
    """Dynamic fine-tuning: cross entropy, each token's scaled by its own probability, detached."""
    tokens = torch.from_numpy(batch["demonstrations"])  # (B, C)
    logits = completion_logits(student, batch["prompts"], tokens)  # (B, C, V)
    nll = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")  # (B, C)
    return (nll * (-nll).exp().detach()).mean()


def reinvoke(student, teacher, batch, generator):
    """SDFT's loss on prompts of prior skills, which the base answers without a demonstration."""
    prompts = dict(prompts=batch["prior_prompts"], teacher_prompts=batch["prior_prompts"])
    return sdft(student, teacher, batch | prompts, generator)


def prior_rows(seed, n):
    """n prompts of all prior skills, of their training inputs, and right answers to them."""
    sets, rng = [skill(name, "train", seed) for name in toy.PRIOR], np.random.default_rng([seed, 4])
    rows = rng.permutation(sum(len(s["prompts"]) for s in sets))[:n]
    keys = ("prompts", "answers")
    return {f"prior_{key}": np.concatenate([s[key] for s in sets])[rows] for key in keys}


def measure_control(seed, settings=None):
    start = student = base(seed)
    if settings:
        data = skill("X", "train", seed)
        data |= common.teacher_texts(start, data, seed) | prior_rows(seed, len(data["prompts"]))
        if settings["method"] is reinvoke:  # after SFT, with the base as the teacher
            student, _ = train(start, data, seed, **SFT)
            settings = settings | dict(teacher=start)
        student, _ = train(student, data, seed, **settings)
    return skill_metrics(student, start, seed)


WEIGHTS = (0.1, 0.3, 1.0)
METHODS = {"sft + replay": replay, "dft": dft, "sft + re-invoke": reinvoke}
CONTROLS_FAMILIES = {f"sft + KL, w {w:g}": SFT | dict(method=kl_penalty, weight=w) for w in WEIGHTS}
CONTROLS_FAMILIES |= {name: SFT | dict(method=method) for name, method in METHODS.items()}
CONTROLS_FAMILIES |= {"offline, reverse KL": SDFT | dict(method=on_texts), "sdft": SDFT}
CONTROL_RATES = dict.fromkeys(CONTROLS_FAMILIES, HIGH)
CONTROL_RATES |= dict.fromkeys(["sft + re-invoke", "offline, reverse KL", "sdft"], LOW)
CONTROLS = runner.Experiment(
    name="controls",
    arms=[dict(arm="base"), *grid(CONTROL_RATES, CONTROLS_FAMILIES)],
    measure=measure_control,
    columns=["new", "prior", "sampled", "KL"],
)

if __name__ == "__main__":
    runner.main(__doc__, ON_POLICY, CONTROLS)
