"""Is it more than sharpening? pass@k: the chance that one of k sampled responses is correct.

    python -m experiments.pass_at_k --seeds 5

Skill X, 128 responses to each of 100 unseen prompts. A method that only sharpens what the base can
do gains at small k alone: as k grows, the base catches up. README.md, "pass@k".
"""

from math import comb

import numpy as np
import torch

from data import toy
from experiments import runner, tables
from experiments.common import base, skill, train_on_skill
from experiments.settings import METHODS
from sdft import rollout

KS = [1, 2, 4, 8, 16, 32, 64, 128]
SAMPLES, AT_ONCE = 128, 16


def pass_at_k(n, c, k):
    """The chance that k of n responses, drawn without replacement, hold one of the c correct ones.

    1 - C(n-c, k) / C(n, k)
    """
    return 1 - comb(n - c, k) / comb(n, k)


def measure(seed, settings=None):
    model, _ = train_on_skill(base(seed), seed, settings)
    test, generator = skill("X", "test", seed, n=100), torch.Generator().manual_seed(seed)
    prompts, answers = (np.repeat(test[key], AT_ONCE, 0) for key in ("prompts", "answers"))
    correct = 0
    for _ in range(SAMPLES // AT_ONCE):
        n = answers.shape[1] + 1
        completions, _ = rollout(model, prompts, n, toy.EOS, generator=generator)
        hits = toy.is_correct(completions.numpy(), answers)
        correct = correct + hits.reshape(-1, AT_ONCE).sum(1)  # (prompts,)
    return {f"pass@{k}": np.mean([pass_at_k(SAMPLES, int(c), k) for c in correct]) for k in KS}


def figure(rows, plt):
    lines = {row["arm"]: [row["metrics"][f"pass@{k}"] for k in KS] for row in rows}
    return tables.panels_of_lines(plt, {"skill X": lines}, KS, "k", "pass@k")


NAMES = ("sft", "sft, own style", "sdft", "sdft, forward KL")
PASS_AT_K = runner.Experiment(
    name="pass_at_k",
    arms=[dict(arm="base"), *(dict(arm=name, settings=METHODS[name]) for name in NAMES)],
    measure=measure,
    columns=[f"pass@{k}" for k in KS],
    figure=figure,
)

if __name__ == "__main__":
    runner.main(__doc__, PASS_AT_K)
