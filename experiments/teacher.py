"""The teacher: is it good, is it close to the base, and which weights should it have?

    python -m experiments.teacher --seeds 5

teacher          skill X; KL(model ‖ base) on its prompts, in nats per response
teacher_weights  α is the student's share in the teacher at every update: 0 frozen, 1 live. At
                 SDFT's rate, at the sweep's highest ("fast"), and with 30% of the demonstrations
                 wrong ("noisy"). "teacher" is the final teacher's accuracy, "teacher, training"
                 that with the training's demonstrations

README.md, "The teacher" and "The teacher's weights".
"""

import numpy as np

from experiments import common, runner
from experiments.common import accuracy, base, kl, skill, train_on_skill
from experiments.settings import METHODS, SDFT


def measure(seed, settings=None, reads="prompts"):
    start, test = base(seed), skill("X", "test", seed)
    model, _ = train_on_skill(start, seed, settings)
    return {"accuracy": accuracy(model, test, reads), "KL": kl(model, start, test, reads)}


NAMES = ("sft", "sft, own style", "sdft", "sdft, forward KL")
TEACHER = runner.Experiment(
    name="teacher",
    arms=[dict(arm="base"), dict(arm="teacher", reads="teacher_prompts")]
    + [dict(arm=name, settings=METHODS[name]) for name in NAMES],
    measure=measure,
    columns=["accuracy", "KL"],
)


def derive(metrics):
    start = np.array(metrics["base"]["new"])
    for of_arm in metrics.values():
        collapsed = np.sum(of_arm["new"] < 0.5 * start)
        of_arm["seeds"] = f"{collapsed} of {len(start)}"


CONDITIONS = {"": (SDFT["lr"], {}), "fast, ": (2e-3, {})}
CONDITIONS |= {"noisy, ": (2e-4, dict(spoiled=["wrong", 0.3]))}
ALPHAS = {"frozen": 0.0, "α .02": 0.02, "α .2": 0.2, "live": 1.0}
TEACHER_WEIGHTS = runner.Experiment(
    name="teacher_weights",
    arms=[dict(arm="base")]
    + [
        dict(arm=condition + name, **fields, settings=SDFT | dict(alpha=alpha, lr=lr))
        for condition, (lr, fields) in CONDITIONS.items()
        for name, alpha in ALPHAS.items()
    ],
    measure=common.measure,
    columns=["new", "prior", "sampled", "teacher", "teacher, training"],
    derive=derive,
)

if __name__ == "__main__":
    runner.main(__doc__, TEACHER, TEACHER_WEIGHTS)
