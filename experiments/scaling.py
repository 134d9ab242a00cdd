"""Does it need in-context learning, and so size?

The paper (SDFT minus SFT, points): −3.3 at 3B, +4.0 at 7B, +6.9 at 14B: small models read
demonstrations badly.

    python -m experiments.scaling --seeds 5

Models of two layers and several widths, pretrained on the same number of tokens with the same
settings. "teacher" is the base's accuracy with a demonstration, "gap" is SDFT minus SFT on skill
X, "prior gap" the same on prior skills. The settings were chosen at width 128.
"""

from experiments import runner
from experiments.common import base, skill, skill_metrics, train_on_skill
from experiments.settings import SDFT, SFT
from train_toy import evaluate

WIDTHS = [16, 32, 64, 128]
ARMS = {f"width {n}": dict(n_embd=n, sft=SFT, sdft=SDFT) for n in WIDTHS}
COLUMNS = ["weights", "base", "teacher", "sft", "sdft", "gap", "prior base", "prior gap"]
WORLDS = [("skills", n) for n in reversed(WIDTHS)]


def measure(seed, n_embd, sft, sdft):
    start, test = base(seed, "skills", n_embd), {"X": skill("X", "test", seed)}
    metrics = {"weights": sum(p.numel() for p in start.parameters())}
    metrics["teacher"] = evaluate(start, test, "teacher_prompts", temperature=1.0)[0]["X"]
    for name, settings in {"base": None, "sft": sft, "sdft": sdft}.items():
        of_model = skill_metrics(train_on_skill(start, seed, settings), seed)
        metrics |= {name: of_model["new"], f"prior {name}": of_model["prior"]}
    metrics["gap"] = metrics["sdft"] - metrics["sft"]
    metrics["prior gap"] = metrics["prior sdft"] - metrics["prior sft"]
    return metrics


def figure(rows, plt):
    drawn, panel = plt.subplots(figsize=(5.5, 3.6))
    widths = [int(row["arm"].split()[1]) for row in rows]
    for metric, fmt in {"teacher": "k--o", "base": "k:o", "sft": "-o", "sdft": "-o"}.items():
        mean, sd = runner.mean_and_sd([row["metrics"][metric] for row in rows])
        panel.errorbar(widths, mean, sd, fmt=fmt, label=metric, capsize=3)
    panel.set(xlabel="width", ylabel="skill X, sampled accuracy", ylim=(-0.03, 1.05))
    panel.set_xticks(widths)
    runner.grid_and_legend(panel)
    return drawn


if __name__ == "__main__":
    runner.main("scaling")
