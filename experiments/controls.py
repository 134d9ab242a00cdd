"""Is it being on-policy, or being close to the base? The baselines that the paper has and lacks.

The paper's baselines (new / prior): Science, SFT 66.2 / 53.4, SFT + re-invoke 66.0 / 60.2, DFT 54.8
/ 60.2, SDFT 70.2 / 64.5. Its critics ask for SFT with a KL penalty and with replay.

    python -m experiments.controls --seeds 5

Skill X. Everyone trains on the same demonstrations at three rates, and keeps the one with the best
accuracy on validation inputs. "SFT + KL" adds w times the KL to the base on the tokens of the
demonstrations; "SFT + replay" adds as many prompts of the prior skills with their right answers;
"DFT" scales each token's loss by the token's own probability; "SFT + re-invoke" goes on, after SFT,
with SDFT's loss on prompts of the prior skills and the base as the teacher. The last two read the
very prompts that "prior" measures, in other inputs: an advantage that SDFT does not have. Offline,
SDFT's loss is taken on responses that were drawn once from the teacher.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data import toy
from experiments import runner, verdicts
from experiments.common import anchored, base, learn_from, skill, skill_metrics, train, validation
from experiments.on_policy import offline_step, samples
from experiments.settings import HIGH, MIDDLE, SFT, grid
from sdft import completion_logits, sft_loss, token_divergence
from train_toy import sdft_step


def scored(student, batch):
    """The demonstrations' logits (B, C, V), tokens and mask (B, C) up to the end token."""
    tokens = torch.from_numpy(batch["demonstrations"])  # (B, C)
    return completion_logits(student, batch["prompts"], tokens), tokens, torch.ones_like(tokens)


def kl_penalty_step(student, teacher, optimizer, batch, generator, weight):
    """SFT with a penalty of weight times KL(student ‖ base); the teacher stays as it began."""
    logits, tokens, mask = scored(student, batch)
    with torch.no_grad():
        of_base = scored(teacher, batch)[0]
    penalty = token_divergence(logits, of_base).mean()
    return learn_from(
        sft_loss(logits, tokens, mask) + weight * penalty, student, teacher, optimizer, 0
    )


def replay_step(student, teacher, optimizer, batch, generator):
    """SFT on the demonstrations and on as many right answers to prompts of prior skills."""
    loss = sft_loss(*scored(student, batch))
    prior = dict(prompts=batch["prior_prompts"], demonstrations=batch["prior_answers"])
    return learn_from(
        (loss + sft_loss(*scored(student, prior))) / 2, student, teacher, optimizer, 0
    )


def dft_step(student, teacher, optimizer, batch, generator):
    """Dynamic fine-tuning: cross entropy, each token's scaled by its own probability, detached."""
    logits, tokens, _ = scored(student, batch)
    nll = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")  # (B, C)
    return learn_from((nll * (-nll).exp().detach()).mean(), student, teacher, optimizer, 0)


def reinvoke_step(student, teacher, optimizer, batch, generator):
    """SDFT's loss on prompts of prior skills, which the base answers without a demonstration."""
    prompts = dict(prompts=batch["prior_prompts"], teacher_prompts=batch["prior_prompts"])
    return sdft_step(student, teacher, optimizer, batch | prompts, generator, alpha=0.0)


FAMILIES = {
    "sft + KL, w 0.1": dict(step=kl_penalty_step, weight=0.1, rates=HIGH),
    "sft + KL, w 0.3": dict(step=kl_penalty_step, weight=0.3, rates=HIGH),
    "sft + KL, w 1": dict(step=kl_penalty_step, weight=1.0, rates=HIGH),
    "sft + replay": dict(step=replay_step, rates=HIGH),
    "dft": dict(step=dft_step, rates=HIGH),
    "sft + re-invoke": dict(step=reinvoke_step, rates=MIDDLE),
    "offline, reverse KL": dict(step=offline_step, rates=MIDDLE),
    "sdft": dict(step=sdft_step, rates=MIDDLE),
}
ARMS = {"base": {}} | {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
COLUMNS = ["new", "prior", "sampled", "KL", "length", "val new", "val prior"]
WORLDS = [("skills",)]
SWEEP = ("val new", "val prior")


def measure(seed, settings=None):
    start = student = base(seed)
    if settings:
        data = skill("X", "train", seed, settings.get("style", "expert"))
        data |= samples(start, seed, "skills") | prior_rows(seed, len(data["prompts"]))
        if (
            settings["step"] is reinvoke_step
        ):  # Its student comes from SFT, its teacher is the base.
            student, _ = train(student, data, seed, **SFT)
            settings = settings | dict(step=anchored(reinvoke_step, start))
        student, _ = train(student, data, seed, **settings)
    return skill_metrics(student, start, seed) | validation(student, seed)


def prior_rows(seed, n):
    """n prompts of all prior skills, of their training inputs, and right answers to them."""
    sets = [skill(name, "train", seed) for name in toy.PRIOR]
    rows = np.random.default_rng([seed, 4]).permutation(sum(len(s["prompts"]) for s in sets))[:n]
    return {
        f"prior_{key}": np.concatenate([s[key] for s in sets])[rows]
        for key in ("prompts", "answers")
    }


def claims(at):
    sdft = {m: at("sdft", m) for m in ("new", "prior")}
    for arm, paper in {
        "sft + re-invoke": "60.2 to 63.7, SDFT 64.5 to 65.4",
        "dft": "60.2 to 64.0, SDFT 64.5 to 65.4",
        "sft + replay": "not reported",
        "sft + KL, w 1": "not reported",
        "offline, reverse KL": "not reported",
    }.items():
        other = {m: at(arm, m) for m in ("new", "prior")}
        new = verdicts.against(sdft["new"], other["new"])
        yield (
            f"SDFT keeps more than {arm.replace('sft', 'SFT').replace('dft', 'DFT')} (prior)",
            paper,
            f"{verdicts.against(sdft['prior'], other['prior'])} (new: {new})",
            verdicts.more(sdft["prior"], other["prior"]),
        )


if __name__ == "__main__":
    runner.main("controls")
