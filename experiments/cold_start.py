"""Cold start: how often must the base be right already?

The paper's base solves 42% of its tasks. Where a policy can hardly solve a task, self-distillation
is reported to have little signal (arXiv 2609.16639).

    python -m experiments.cold_start --seeds 5

Five skills of which the base's training followed the right table on 0, 3, 10, 30 and 60 of 100
prompts, otherwise the rival's; which skill has which level changes with the seed. (Next to a bare
answer, in 2% of its lines, the right table is followed always.) Every method gets two rates per
level, the better one by validation.
"""

from data import toy
from experiments import runner, verdicts
from experiments.common import base, skill_metrics, train_on_skill, validation
from experiments.settings import chosen, grid
from train_toy import sdft_step, sft_step

FAMILIES = {
    "sft": dict(step=sft_step, rates=(6e-4, 2e-3)),
    "sdft": dict(step=sdft_step, rates=(2e-4, 6e-4)),
    "sdft, forward KL": dict(step=sdft_step, divergence="forward", rates=(2e-4, 6e-4)),
    "sdft, JSD": dict(step=sdft_step, divergence="jsd", rates=(2e-4, 6e-4)),
}
LEVELS = [*toy.COLD.values()]
ARMS = {f"{p:g}, base": dict(level=p) for p in LEVELS}
ARMS |= {
    f"{p:g}, {arm}": dict(level=p, settings=settings)
    for p in LEVELS
    for arm, settings in grid(FAMILIES).items()
}
COLUMNS = ["new", "sampled", "prior"]
WORLDS = [("skills",)]
SWEEP = ("val new", "val prior")


def measure(seed, level, settings=None):
    start = base(seed)
    name = {p: name for name, p in toy.cold_skills(seed).items()}[level]
    student = train_on_skill(start, seed, settings, name)
    return skill_metrics(student, start, seed, name) | validation(student, seed, name)


def claims(at):
    for level in LEVELS[:3]:
        pair = [at(f"{level:g}, {arm}", "new") for arm in ("sdft, forward KL", "sdft")]
        yield (
            f"where the base is trained to be right {level:.0%} of the time, the forward KL learns "
            "more than the reverse",
            "not reported",
            verdicts.against(*pair),
            verdicts.more(*pair),
        )


def figure(rows, plt):
    best, by_arm = chosen(rows, *SWEEP), {row["arm"]: row["metrics"] for row in rows}
    drawn, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for panel, metric in zip(panels, ("new", "prior")):
        for family in ["base", *FAMILIES]:
            arms = [best.get(f"{p:g}, {family}", f"{p:g}, {family}") for p in LEVELS]
            mean, sd = runner.mean_and_sd([by_arm[arm][metric] for arm in arms])
            fmt = "k:o" if family == "base" else "-o"
            panel.errorbar(range(len(LEVELS)), mean, sd, fmt=fmt, label=family, capsize=3)
        panel.set_xticks(range(len(LEVELS)), [f"{p:g}" for p in LEVELS])
        panel.set(xlabel="how often the base's training was right", ylim=(-0.03, 1.05))
        panel.set_title({"new": "the skill", "prior": "prior skills"}[metric])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("greedy accuracy")
    runner.grid_and_legend(panels[1])
    return drawn


if __name__ == "__main__":
    runner.main("cold_start")
