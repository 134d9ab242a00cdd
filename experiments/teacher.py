"""The teacher: is it good, is it close to the base, and which weights should it have?

    python -m experiments.teacher --seeds 5

teacher          skill X; KL(model ‖ base) on its prompts, in nats per response
teacher_weights  α is the student's share in the teacher at every update: 0 frozen, 1 live. At
                 SDFT's rate, at the sweep's highest ("fast"), and with 30% of the demonstrations
                 wrong ("noisy"). "teacher" is the final teacher's accuracy, "teacher, noisy" that
                 with the training's demonstrations, "collapsed" the share of seeds that end below
                 half of the base's accuracy on X

README.md, "The teacher" and "The teacher's weights".
"""

from experiments import runner
from experiments.common import accuracy, base, kl, skill, skill_metrics, train, train_on_skill
from experiments.settings import METHODS, RATES, SDFT
from experiments.worlds import spoil


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


def measure_weights(seed, alpha, lr, share):
    start, test = base(seed), skill("X", "test", seed)
    data = spoil(skill("X", "train", seed), "wrong", share, seed)
    student, teacher = train(start, data, seed, **SDFT | dict(alpha=alpha, lr=lr))
    metrics = skill_metrics(student, start, seed)
    metrics["teacher"] = accuracy(teacher, test, "teacher_prompts")
    metrics["teacher, noisy"] = accuracy(teacher, data, "teacher_prompts")
    metrics["collapsed"] = metrics["new"] < 0.5 * accuracy(start, test)
    return metrics


def derive(metrics):
    for of_arm in metrics.values():
        collapsed = of_arm["collapsed"]
        of_arm["seeds"] = f"{sum(collapsed):.0f} of {len(collapsed)}"


CONDITIONS = {
    "": dict(lr=SDFT["lr"], share=0.0),
    "fast, ": dict(lr=RATES[-1], share=0.0),
    "noisy, ": dict(lr=2e-4, share=0.3),
}
ALPHAS = {"frozen": 0.0, "α .02": 0.02, "α .2": 0.2, "live": 1.0}
TEACHER_WEIGHTS = runner.Experiment(
    name="teacher_weights",
    arms=[
        dict(arm=condition + name, alpha=alpha, **fields)
        for condition, fields in CONDITIONS.items()
        for name, alpha in ALPHAS.items()
    ],
    measure=measure_weights,
    columns=["new", "prior", "sampled", "teacher", "teacher, noisy", "collapsed"],
    derive=derive,
)

if __name__ == "__main__":
    runner.main(__doc__, TEACHER, TEACHER_WEIGHTS)
