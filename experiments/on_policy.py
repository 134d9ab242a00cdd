"""Does it matter that the student is scored on its own responses?

The paper (Fig. 6, tool use), best first: SDFT, the same loss on responses drawn once from the
teacher ("offline"), SFT on those responses. Read-offs of the numbers disagree.

    python -m experiments.on_policy --seeds 5

Skill X with prompts of 3 and of 5 digits, answers of 2 and 4 steps: a long answer can go wrong
early and has to be answered for later. Every arm has the same two rates, the better by validation.
"step 1", "step 2" and "step 4" are the shares of answers that are correct up to there. "recovers"
forces the rival's first step on the model, where that is wrong: the share of the later steps that
follow skill X's own table from what stands there.
"""

import numpy as np
import torch

from data import toy
from experiments import runner, verdicts
from experiments.common import LONG, base, learn_from, skill, skill_metrics, train, validation
from experiments.settings import LOW, grid
from sdft import distill_loss, rollout
from train_toy import limit, sdft_step, sft_step


def offline_step(student, teacher, optimizer, batch, generator, divergence="reverse", alpha=0.02):
    """One update by SDFT's loss on the teacher's responses in place of the student's."""
    completions, mask = (torch.from_numpy(batch[key]) for key in ("samples", "samples_mask"))
    contexts = batch["prompts"], batch["teacher_prompts"]
    loss, _ = distill_loss(student, teacher, *contexts, completions, mask, divergence)
    return learn_from(loss, student, teacher, optimizer, alpha)


FAMILIES = {
    "sdft": dict(step=sdft_step, rates=LOW),
    "offline": dict(step=offline_step, rates=LOW),
    "sdft, forward KL": dict(step=sdft_step, divergence="forward", rates=LOW),
    "offline, forward KL": dict(step=offline_step, divergence="forward", rates=LOW),
    "sft, offline": dict(step=sft_step, rates=LOW),
}
DIGITS = {f"{toy.N_DIGITS} digits": "skills", f"{LONG} digits": "long"}
ARMS = {}
for digits, world in DIGITS.items():
    ARMS[f"{digits}, base"] = dict(world=world)
    for arm, settings in grid(FAMILIES).items():
        ARMS[f"{digits}, {arm}"] = dict(world=world, arm=arm, settings=settings)
COLUMNS = ["new", "prior", "sampled", "step 1", "step 2", "step 4", "recovers"]
WORLDS = [("skills",), ("long",)]
SWEEP = ("val new", "val prior")


def measure(seed, world, arm="", settings=None):
    start = student = base(seed, world)
    data = skill("X", "train", seed, world=world) | samples(start, seed, world)
    if arm.startswith("sft"):
        data["demonstrations"] = data["samples"]
    if settings:
        student, _ = train(start, data, seed, **settings)
    test = skill("X", "test", seed, world=world)
    metrics = skill_metrics(student, start, seed, world=world) | by_step(student, test)
    return metrics | {"recovers": recovers(student, test)} | validation(student, seed, world=world)


def samples(model, seed, world):
    """The teacher's responses to the training prompts, and their mask."""
    data = skill("X", "train", seed, world=world)
    generator = torch.Generator().manual_seed(seed)
    n = limit(data["answers"])
    drawn = rollout(model, data["teacher_prompts"], n, toy.EOS, generator=generator)
    return {"samples": drawn[0].numpy(), "samples_mask": drawn[1].numpy()}


def by_step(model, data):
    """{"step 1": share of greedy answers that are correct up to there}, for steps 1, 2 and 4."""
    answers = data["answers"]  # (n, R + 1)
    said = rollout(model, data["prompts"], answers.shape[1], toy.EOS, 0)[0].numpy()
    said = np.pad(said, ((0, 0), (0, answers.shape[1] - said.shape[1])), constant_values=toy.EOS)
    right = np.cumprod(toy.content(said) == answers, 1).mean(0)  # (R + 1,)
    return {f"step {t}": right[t - 1] for t in (1, 2, 4) if t < answers.shape[1]}


def recovers(model, data):
    """The share of steps by skill X's own table, after the rival's first step, where that is wrong.

    The forced step stands at the end of the prompt, as if the model had said it.
    """
    digits = data["prompts"][:, 2:-1]  # (n, N)
    own, rival = toy.TABLES[toy.NAMES.index("X")], toy.TABLES[toy.NAMES.index(toy.RIVALS["X"])]
    forced = rival[digits[:, 0], digits[:, 1]]  # (n,)
    wrong = forced != own[digits[:, 0], digits[:, 1]]
    prompts, digits = np.column_stack([data["prompts"], forced])[wrong], digits[wrong]
    said = rollout(model, prompts, digits.shape[1] - 2, toy.EOS, 0)[0].numpy()
    said = toy.content(said)  # (n, R - 1)
    before = np.column_stack([forced[wrong], said])[:, :-1]
    later = digits[:, 2 : 2 + said.shape[1]]  # (n, R - 1)
    follows = (said < 10) & (said == own[np.minimum(before, 9), later])
    return follows.sum() / (len(digits) * (digits.shape[1] - 2))


def claims(at):
    for digits in DIGITS:
        new = [at(f"{digits}, {arm}", "new") for arm in ("sdft", "offline", "sft, offline")]
        yield (
            f"on-policy learns more, reverse KL (new, {digits}: SDFT / offline / SFT offline)",
            "in this order (Fig. 6)",
            " / ".join(map(runner.mean_and_spread, new)),
            verdicts.more(new[0], new[1]),
        )
    for metric, name in (("prior", "forgets less"), ("recovers", "recovers from an error more")):
        pair = [at(f"{LONG} digits, {arm}", metric) for arm in ("sdft", "offline")]
        yield (
            f"on-policy {name}, reverse KL ({LONG} digits: SDFT against offline)",
            "not reported",
            verdicts.against(*pair),
            verdicts.more(*pair),
        )


if __name__ == "__main__":
    runner.main("on_policy")
