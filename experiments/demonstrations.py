"""How many demonstrations does it take? 8 to 400 of them, on skill X.

The paper trains on full sets only, so its "SDFT learns more than SFT" does not say at what size.

    python -m experiments.demonstrations --seeds 5

Every method has 160 updates, and for every number of demonstrations two rates, SFT all five, of
which the best is chosen on validation inputs. A batch has at most as many rows as there are
demonstrations.
"""

from experiments import runner, verdicts
from experiments.common import base, first_rows, skill, skill_metrics, train, validation
from experiments.settings import LOW, chosen, grid
from train_toy import sdft_step, sft_step

NUMBERS = [8, 16, 32, 64, 128, 400]
FAMILIES = {
    "sft": dict(step=sft_step),
    "sft, own style": dict(step=sft_step, style="own", rates=LOW),
    "sdft": dict(step=sdft_step, rates=LOW),
    "sdft, forward KL": dict(step=sdft_step, divergence="forward", rates=LOW),
}
ARMS = {
    f"{n}, {arm}": dict(n=n, settings=settings)
    for n in NUMBERS
    for arm, settings in grid(FAMILIES).items()
}
COLUMNS = ["new", "sampled", "prior", "KL"]
WORLDS = [("skills",)]
SWEEP = ("val new", "val prior")


def measure(seed, n, settings):
    start = base(seed)
    data = first_rows(skill("X", "train", seed, settings.get("style", "expert")), n)
    student, _ = train(start, data, seed, **settings)
    return skill_metrics(student, start, seed) | validation(student, seed)


def claims(at):
    for n in (8, 32, 128):
        pair = [at(f"{n}, {arm}", "new") for arm in ("sdft", "sft")]
        yield (
            f"SDFT learns more than SFT from {n} demonstrations (new)",
            "4 to 7 points more from the full sets",
            verdicts.against(*pair),
            verdicts.more(*pair),
        )
    pair = [at(f"8, {arm}", "new") for arm in ("sdft", "sft, own style")]
    yield (
        "SDFT learns more than SFT in the model's own style from 8 demonstrations (new)",
        "not reported",
        verdicts.against(*pair),
        verdicts.more(*pair),
    )


def figure(rows, plt):
    best, by_arm = chosen(rows, *SWEEP), {row["arm"]: row["metrics"] for row in rows}
    drawn, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for panel, metric in zip(panels, ("new", "prior")):
        for family in FAMILIES:
            arms = [best[f"{n}, {family}"] for n in NUMBERS]
            mean, sd = runner.mean_and_sd([by_arm[arm][metric] for arm in arms])
            panel.errorbar(NUMBERS, mean, sd, fmt="-o", label=family, capsize=3)
        panel.set(xscale="log", xlabel="demonstrations", ylim=(-0.03, 1.05))
        panel.set_xticks(NUMBERS, NUMBERS)
        panel.set_title({"new": "skill X", "prior": "prior skills"}[metric])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("greedy accuracy")
    runner.grid_and_legend(panels[1])
    return drawn


if __name__ == "__main__":
    runner.main("demonstrations")
