"""Does it last? Thirteen skills in a row, short stages.

The paper goes three skills far. A follow-up found, after 20 writes, a model that is its own moving
teacher worst, and the original model as a fixed teacher best (arXiv 2607.11020).

    python -m experiments.many_stages --seeds 5

The eight skills of which the base's training was right as often as in the toy, then five others on
which its training was right from 0 to 60 of 100 times, in an order that changes with the seed; 60
updates each. The teacher is a moving average that starts as the current student, the student as the
stage found it, or the original base. "own" is the mean over the eight skills right after their
stages, "8" and "end" their mean after stages 8 and 13; "prior 4" to "prior 13" are the prior
skills.
"""

import numpy as np

from data import toy
from experiments import runner, verdicts
from experiments.common import anchored, base, kl, skill, train
from experiments.settings import SDFT, SFT, SFT_OWN
from train_toy import evaluate

SHORT = 60
ARMS = {
    "base": {},
    "sft": dict(settings=SFT | dict(steps=SHORT)),
    "sft, own style": dict(settings=SFT_OWN | dict(steps=SHORT, lr=2e-4)),
    "sdft, EMA teacher": dict(settings=SDFT | dict(steps=SHORT, lr=2e-4)),
    "sdft, teacher of the stage's start": dict(
        settings=SDFT | dict(steps=SHORT, lr=2e-4, alpha=0.0)
    ),
    "sdft, original teacher": dict(
        settings=SDFT | dict(steps=SHORT, lr=2e-4, alpha=0.0), original=True
    ),
}
COLUMNS = ["own", "8", "end", "prior 4", "prior 8", "prior 13", "teacher", "KL prior"]
WORLDS = [("skills",)]


def measure(seed, settings=None, original=False):
    start = student = teacher = base(seed)
    if original:
        settings = settings | dict(step=anchored(settings["step"], start))
    stages = [*toy.HALF, *reversed(toy.COLD)]
    names = [*toy.PRIOR, *toy.HALF]
    test = {k: skill(k, "test", seed, n=100) for k in names}
    metrics, own = {}, []
    accuracy = evaluate(student, test)[0]
    for i, name in enumerate(stages, 1):
        if settings:
            data = skill(name, "train", seed, settings.get("style", "expert"))
            student, teacher = train(student, data, seed, **settings)
            teacher = start if original else teacher
            accuracy = evaluate(student, test)[0]
        metrics[f"prior {i}"] = np.mean([accuracy[k] for k in toy.PRIOR])
        if name in toy.HALF:
            own.append(accuracy[name])
        if i == len(toy.HALF):
            metrics["8"] = np.mean([accuracy[k] for k in toy.HALF])
    metrics["own"], metrics["end"] = np.mean(own), np.mean([accuracy[k] for k in toy.HALF])
    new = {k: test[k] for k in toy.HALF}
    metrics["teacher"] = np.mean([*evaluate(teacher, new, "teacher_prompts")[0].values()])
    rows = {key: np.concatenate([test[k][key] for k in toy.PRIOR]) for key in test["A"]}
    metrics["KL prior"] = kl(student, start, rows["prompts"], rows["answers"])
    return metrics


def claims(at):
    ema, original = (
        {m: at(f"sdft, {arm}", m) for m in ("end", "prior 13")}
        for arm in ("EMA teacher", "original teacher")
    )
    yield (
        "over many stages a fixed original teacher keeps more than a moving one (prior after 13)",
        "not in the paper; a follow-up says so",
        verdicts.against(original["prior 13"], ema["prior 13"]),
        verdicts.more(original["prior 13"], ema["prior 13"]),
    )
    sft = at("sft", "end")
    yield (
        "after thirteen stages SDFT has more of the eight skills than SFT (mean of the eight)",
        "three skills only",
        verdicts.against(ema["end"], sft),
        verdicts.more(ema["end"], sft),
    )


def figure(rows, plt):
    drawn, panel = plt.subplots(figsize=(6.5, 3.4))
    for row in rows[1:]:
        stages = range(1, len(toy.HALF) + len(toy.COLD) + 1)
        values = [row["metrics"][f"prior {i}"] for i in stages]
        mean, sd = runner.mean_and_sd(values)
        panel.errorbar([*stages], mean, sd, fmt="-o", label=row["arm"], capsize=2, markersize=3)
    panel.set(xlabel="skills learned", ylabel="prior skills, greedy accuracy", ylim=(-0.03, 1.05))
    runner.grid_and_legend(panel)
    return drawn


if __name__ == "__main__":
    runner.main("many_stages")
