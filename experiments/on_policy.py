"""Does it matter that the student is scored on its own responses?

The paper (tool use): SDFT about 70, the same loss on responses drawn once from the teacher about 63, SFT on those about 61.

    python -m experiments.on_policy --seeds 5

Skill X. The teacher's responses are in the model's own style, so that SFT on them gets what was chosen for own-style demonstrations; the loss on
fixed responses gets SDFT's settings.
"""

import torch

from data import toy
from experiments import runner
from experiments.common import base, skill, skill_metrics, train
from experiments.settings import SDFT, SDFT_FORWARD, SFT, SFT_OWN
from sdft import completion_logits, rollout, sdft_loss
from train_toy import MAX_NEW_TOKENS, evaluate


def offline(kl):
    """SDFT's loss on the teacher's responses in place of the student's."""

    def loss(student, teacher, batch, generator):
        y, mask = torch.from_numpy(batch["samples"]), torch.from_numpy(batch["samples_mask"])
        with torch.no_grad():
            teacher_logits = completion_logits(teacher, batch["teacher_prompts"], y)
        return sdft_loss(completion_logits(student, batch["prompts"], y), teacher_logits, mask, kl)[0], int(mask.sum())

    return loss


ARMS = {
    "base": {},
    "sdft": SDFT,
    "offline, reverse KL": dict(SDFT, method=offline("reverse")),
    "sdft, forward KL": SDFT_FORWARD,
    "offline, forward KL": dict(SDFT_FORWARD, method=offline("forward")),
    "sft, offline": SFT_OWN,
    "sft": SFT,
}
ARMS = {arm: dict(arm=arm, settings=settings) for arm, settings in ARMS.items()}
COLUMNS = ["new", "prior", "Y", "Z", "new greedy"]
WORLDS = [("skills",)]


def measure(seed, arm, settings):
    student, data = base(seed), skill("X", "train", seed)
    y, mask = rollout(student, data["teacher_prompts"], MAX_NEW_TOKENS, toy.EOS, generator=torch.Generator().manual_seed(seed))
    data |= {"samples": y.numpy(), "samples_mask": mask.numpy()}
    if arm == "sft, offline":
        data["demonstrations"] = data["samples"]
    if settings:
        student, _ = train(student, data, seed, **settings)
    untrained = evaluate(student, {k: skill(k, "test", seed) for k in "YZ"}, temperature=1.0)[0]
    return skill_metrics(student, seed) | untrained


if __name__ == "__main__":
    runner.main("on_policy")
