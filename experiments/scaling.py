"""Does it need in-context learning, and so size?

The paper (SDFT minus SFT, points): −3.3 at 3B, +4.0 at 7B, +6.9 at 14B: small models read
demonstrations badly.

    python -m experiments.scaling --seeds 5

Models of several depths and widths, pretrained on the same number of tokens with the same settings.
Each method has two rates, the better by validation. "teacher" is the base's accuracy with a
demonstration: the paper's reason can be tested only if it differs between the sizes.
"""

from experiments import runner, verdicts
from experiments.common import base, skill, skill_metrics, train_on_skill, validation
from experiments.settings import HIGH, LOW, grid
from train_toy import evaluate, sdft_step, sft_step

SIZES = {"1 x 128": (1, 128), "2 x 32": (2, 32), "2 x 64": (2, 64), "2 x 128": (2, 128)}
FAMILIES = {"sft": dict(step=sft_step, rates=HIGH[1:]), "sdft": dict(step=sdft_step, rates=LOW)}
ARMS = {f"{size}, base": dict(size=size) for size in SIZES}
ARMS |= {
    f"{size}, {arm}": dict(size=size, settings=settings)
    for size in SIZES
    for arm, settings in grid(FAMILIES).items()
}
COLUMNS = ["new", "prior", "sampled", "teacher", "weights"]
WORLDS = [("skills", *SIZES[size]) for size in reversed(SIZES)]
SWEEP = ("val new", "val prior")


def measure(seed, size, settings=None):
    start, test = base(seed, "skills", *SIZES[size]), {"X": skill("X", "test", seed)}
    student = train_on_skill(start, seed, settings)
    metrics = skill_metrics(student, start, seed) | validation(student, seed)
    metrics["weights"] = sum(p.numel() for p in start.parameters())
    metrics["teacher"] = evaluate(start, test, "teacher_prompts")[0]["X"]
    return metrics


def claims(at):
    gap = {size: at(f"{size}, sdft", "new") - at(f"{size}, sft", "new") for size in SIZES}
    shown = ", ".join(f"{size} {runner.mean_and_spread(values)}" for size, values in gap.items())
    yield (
        "SDFT gains on SFT with size (SDFT minus SFT, layers x width)",
        "3B −3.3, 7B +4.0, 14B +6.9 points",
        shown,
        verdicts.more(gap["2 x 128"], gap["2 x 32"]),
    )
    worst = min(at(f"{size}, base", "teacher").mean() for size in SIZES)
    yield (
        "... since small models read demonstrations badly (the teacher's accuracy at every size)",
        "the paper's reason",
        f"at least {worst:.2f}",
        verdicts.CANNOT + ": every size reads them",
    )


if __name__ == "__main__":
    runner.main("scaling")
