"""Does it matter that the student is scored on its own responses?

The paper (Fig. 6, tool use), best first: SDFT, the same loss on responses drawn once from the
teacher ("offline"), SFT on those responses. Read off: about 70, 63, 61.

    python -m experiments.on_policy --seeds 5

Skill X. The teacher's responses are in the model's own style, so SFT on them gets the settings
chosen for own-style demonstrations; the offline loss gets SDFT's settings.
"""

import torch

from data import toy
from experiments import runner
from experiments.common import base, learn_from, skill, skill_metrics, train
from experiments.settings import SDFT, SDFT_FORWARD, SFT, SFT_OWN
from sdft import distill_loss, rollout
from train_toy import MAX_NEW_TOKENS, evaluate


def offline_step(student, teacher, optimizer, batch, generator, divergence="reverse", alpha=0.02):
    """One update by SDFT's loss on the teacher's responses in place of the student's."""
    completions, mask = (torch.from_numpy(batch[key]) for key in ("samples", "samples_mask"))
    contexts = batch["prompts"], batch["teacher_prompts"]
    loss, _ = distill_loss(student, teacher, *contexts, completions, mask, divergence)
    return learn_from(loss, student, teacher, optimizer, alpha)


ARMS = {
    "base": {},
    "sdft": SDFT,
    "offline, reverse KL": dict(SDFT, step=offline_step),
    "sdft, forward KL": SDFT_FORWARD,
    "offline, forward KL": dict(SDFT_FORWARD, step=offline_step),
    "sft, offline": SFT_OWN,
    "sft": SFT,
}
ARMS = {arm: dict(arm=arm, settings=settings) for arm, settings in ARMS.items()}
COLUMNS = ["new", "prior", "Y", "Z", "new greedy"]
WORLDS = [("skills",)]


def measure(seed, arm, settings):
    student, data = base(seed), skill("X", "train", seed)
    generator = torch.Generator().manual_seed(seed)
    completions, mask = rollout(
        student, data["teacher_prompts"], MAX_NEW_TOKENS, toy.EOS, generator=generator
    )
    data |= {"samples": completions.numpy(), "samples_mask": mask.numpy()}
    if arm == "sft, offline":
        data["demonstrations"] = data["samples"]
    if settings:
        student, _ = train(student, data, seed, **settings)
    others = {name: skill(name, "test", seed) for name in "YZ"}
    return skill_metrics(student, seed) | evaluate(student, others, temperature=1.0)[0]


if __name__ == "__main__":
    runner.main("on_policy")
