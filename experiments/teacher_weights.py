"""Which weights should the teacher have?

A moving average of the student's (EMA), the start's (frozen), or the student's own (live). The
paper (tool use): EMA about 70, frozen about 65, and with a live teacher training diverges.

    python -m experiments.teacher_weights --seeds 5

α is the student's share in the teacher at every update: 0 frozen, 1 live. On skill X with SDFT's
settings, and at the highest rate of the sweep ("fast"). "collapsed" is the share of seeds that end
below half of the base's accuracy on X; "teacher" is the final teacher's own accuracy with a
demonstration.
"""

from experiments import runner
from experiments.common import base, skill, skill_metrics, train
from experiments.settings import SDFT
from train_toy import evaluate

ALPHAS = {"frozen": 0.0, "α .01": 0.01, "α .02": 0.02, "α .05": 0.05, "α .2": 0.2, "live": 1.0}
ARMS = {arm: SDFT | dict(alpha=alpha) for arm, alpha in ALPHAS.items()}
ARMS |= {f"fast, {arm}": settings | dict(lr=1e-3) for arm, settings in ARMS.items()}
COLUMNS = ["new", "prior", "teacher", "collapsed"]
WORLDS = [("skills",)]


def measure(seed, **settings):
    start = base(seed)
    student, teacher = train(start, skill("X", "train", seed), seed, **settings)
    metrics, test = skill_metrics(student, seed), {"X": skill("X", "test", seed)}
    metrics["teacher"] = evaluate(teacher, test, "teacher_prompts", temperature=1.0)[0]["X"]
    metrics["collapsed"] = metrics["new"] < 0.5 * evaluate(start, test, temperature=1.0)[0]["X"]
    return metrics


if __name__ == "__main__":
    runner.main("teacher_weights")
