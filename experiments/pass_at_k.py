"""Is it more than sharpening? pass@k: the chance that one of k sampled responses is correct.

The paper: SDFT above SFT above the base for every k up to 128.

    python -m experiments.pass_at_k --seeds 5

Skill X, 128 responses to each of 100 unseen prompts, the unbiased estimator of Chen et al. (arXiv
2107.03374). A method that only sharpens what the base can do gains at small k alone: as k grows,
the base catches up.
"""

from math import comb

import numpy as np
import torch

from data import toy
from experiments import runner, verdicts
from experiments.common import base, skill, train_on_skill
from experiments.settings import SDFT, SDFT_FORWARD, SFT, SFT_OWN
from sdft import rollout
from train_toy import limit

ARMS = {
    "base": None,
    "sft": SFT,
    "sft, own style": SFT_OWN,
    "sdft": SDFT,
    "sdft, forward KL": SDFT_FORWARD,
}
ARMS = {arm: dict(settings=settings) for arm, settings in ARMS.items()}
KS = [1, 2, 4, 8, 16, 32, 64, 128]
COLUMNS = [f"pass@{k}" for k in KS]
WORLDS = [("skills",)]
SAMPLES, AT_ONCE = 128, 16


def pass_at_k(n, c, k):
    """The chance that k of n responses, drawn without replacement, hold one of the c correct ones.

    1 - C(n-c, k) / C(n, k)
    """
    return 1 - comb(n - c, k) / comb(n, k)


def measure(seed, settings):
    model, test = train_on_skill(base(seed), seed, settings), skill("X", "test", seed, n=100)
    generator = torch.Generator().manual_seed(seed)
    prompts, answers = (np.repeat(test[key], AT_ONCE, 0) for key in ("prompts", "answers"))
    correct = 0
    for _ in range(SAMPLES // AT_ONCE):
        completions, _ = rollout(model, prompts, limit(answers), toy.EOS, generator=generator)
        hits = toy.is_correct(completions.numpy(), answers)
        correct = correct + hits.reshape(-1, AT_ONCE).sum(1)  # (prompts,)
    return {f"pass@{k}": np.mean([pass_at_k(SAMPLES, int(c), k) for c in correct]) for k in KS}


def figure(rows, plt):
    drawn, panel = plt.subplots(figsize=(5.5, 3.6))
    for row in rows:
        mean, sd = runner.mean_and_sd([row["metrics"][c] for c in COLUMNS])
        panel.errorbar(KS, mean, sd, fmt="-o", label=row["arm"], capsize=3)
    panel.set(xscale="log", xlabel="k", ylabel="pass@k on skill X", ylim=(-0.03, 1.05))
    panel.set_xticks(KS, KS)
    runner.grid_and_legend(panel)
    return drawn


def claims(at):
    for upper, lower in (("SDFT", "SFT"), ("SFT", "base")):
        for k in (KS[0], KS[-1]):
            pair = [
                at(arm.lower() if arm != "base" else arm, f"pass@{k}") for arm in (upper, lower)
            ]
            yield (
                f"pass@{k}: {upper} above {lower}",
                "for every k up to 128",
                verdicts.against(*pair),
                verdicts.more(*pair),
            )


if __name__ == "__main__":
    runner.main("pass_at_k")
