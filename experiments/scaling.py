"""Does it need in-context learning, and so size?

The paper (SDFT minus SFT, points): −3.3 at 3B, +4.0 at 7B, +6.9 at 14B: small models read demonstrations badly.

    python -m experiments.scaling --seeds 5

Models of two layers and several widths, pretrained on the same number of tokens with the same settings. "teacher" is the base's accuracy with a
demonstration, "gap" is SDFT minus SFT on skill X, "prior gap" the same on prior skills. The settings were chosen at width 128.
"""

import numpy as np

from experiments import runner
from experiments.common import base, skill, skill_metrics, train_on_skill
from experiments.settings import SDFT, SFT
from train_toy import evaluate

WIDTHS = [16, 32, 64, 128]
ARMS = {f"width {n}": dict(n_embd=n, sft=SFT, sdft=SDFT) for n in WIDTHS}
COLUMNS = ["weights", "base", "teacher", "sft", "sdft", "gap", "prior base", "prior gap"]
WORLDS = [("skills", n) for n in reversed(WIDTHS)]


def measure(seed, n_embd, sft, sdft):
    start = base(seed, "skills", n_embd)
    before, sft, sdft = (skill_metrics(train_on_skill(start, seed, settings), seed) for settings in (None, sft, sdft))
    return {
        "weights": sum(p.numel() for p in start.parameters()),
        "teacher": evaluate(start, {"X": skill("X", "test", seed)}, "teacher_prompts", temperature=1.0)[0]["X"],
        "base": before["new"], "sft": sft["new"], "sdft": sdft["new"], "gap": sdft["new"] - sft["new"],
        "prior base": before["prior"], "prior sft": sft["prior"], "prior sdft": sdft["prior"], "prior gap": sdft["prior"] - sft["prior"],
    }  # fmt: skip


def figure(rows, plt):
    drawn, panel = plt.subplots(figsize=(5.5, 3.6))
    widths = [int(r["arm"].split()[1]) for r in rows]
    for metric, fmt in [("teacher", "k--o"), ("base", "k:o"), ("sft", "-o"), ("sdft", "-o")]:
        values = [r["metrics"][metric] for r in rows]
        panel.errorbar(widths, np.mean(values, 1), np.std(values, 1, ddof=len(values[0]) > 1), fmt=fmt, label=metric, capsize=3)
    panel.set(xlabel="width", ylabel="skill X, sampled accuracy", ylim=(-0.03, 1.05))
    panel.set_xticks(widths)
    panel.grid(alpha=0.3)
    panel.legend()
    return drawn


if __name__ == "__main__":
    runner.main("scaling")
