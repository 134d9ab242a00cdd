"""What do bad demonstrations do?

The paper's demonstrations are all right, each for its own prompt.

    python -m experiments.mismatch --seeds 5

Skill X at SDFT's settings, with a share of the demonstrations spoiled: "wrong" ones have random
results, "another row's" belong to another prompt, "one for all" is the same right demonstration, of
one prompt, everywhere. "teacher" is the base's accuracy with the training demonstrations, spoiled
ones included. SFT on wrong demonstrations stands beside it.
"""

import numpy as np

from data import toy
from experiments import runner, verdicts
from experiments.common import base, skill, skill_metrics, train
from experiments.settings import SDFT, SDFT_FORWARD, SFT_OWN
from train_toy import evaluate, sdft_step

SHARES = (0.2, 1.0)
ARMS = {"none": dict(settings=SDFT), "none, forward KL": dict(settings=SDFT_FORWARD)}
ARMS["none, sft in own style"] = dict(settings=SFT_OWN)
for kind in ("wrong", "another row's", "one for all"):
    ARMS |= {f"{s:.0%} {kind}": dict(kind=kind, share=s, settings=SDFT) for s in SHARES}
for name, settings in {"forward KL": SDFT_FORWARD, "sft in own style": SFT_OWN}.items():
    ARMS |= {
        f"{s:.0%} wrong, {name}": dict(kind="wrong", share=s, settings=settings) for s in SHARES
    }
COLUMNS = ["new", "prior", "sampled", "teacher", "KL"]
WORLDS = [("skills",)]


def spoiled(data, kind, share, seed):
    """The data with that share of its demonstrations spoiled, in the teacher's prompts as well."""
    rng = np.random.default_rng([seed, 5])
    good = data["demonstrations"]  # (n, R + 1)
    wrong = rng.integers(10, size=good[:, :-1].shape)  # (n, R)
    style = "own" if good[0, 0] < toy.LETTERS else "expert"
    bad = {
        "wrong": toy.answers(wrong, style),
        "another row's": np.roll(good, 1, 0),
        "one for all": np.broadcast_to(good[:1], good.shape),
    }[kind]
    demonstrations = np.where(rng.random((len(good), 1)) < share, bad, good)
    prompts = data["prompts"]
    contexts = toy.teacher_context(prompts[:, 1], prompts[:, 2:-1], demonstrations)
    return data | {"demonstrations": demonstrations, "teacher_prompts": contexts}


def measure(seed, settings, kind="wrong", share=0.0):
    start = base(seed)
    data = spoiled(skill("X", "train", seed, settings.get("style", "expert")), kind, share, seed)
    student, _ = train(start, data, seed, **settings)
    metrics = skill_metrics(student, start, seed)
    if settings["step"] is sdft_step:
        metrics["teacher"] = evaluate(start, {"X": data}, "teacher_prompts")[0]["X"]
    return metrics


def claims(at):
    for metric in ("new", "sampled"):
        pair = [at(arm, metric) for arm in ("20% wrong", "20% wrong, sft in own style")]
        yield (
            "with 20% wrong demonstrations SDFT learns more than SFT in the model's own style "
            f"({metric})",
            "not reported",
            verdicts.against(*pair),
            verdicts.more(*pair),
        )
    pair = [at("none", "new"), at("20% wrong", "new")]
    yield (
        "20% wrong demonstrations cost accuracy (new: none against 20% wrong)",
        "not reported",
        verdicts.against(*pair),
        verdicts.more(*pair),
    )


if __name__ == "__main__":
    runner.main("mismatch")
