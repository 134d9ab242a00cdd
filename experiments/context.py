"""What must the teacher read to teach facts? The expert's answer, the article, or both.

The paper (knowledge, strict): answer only about 37, article only about 75, both 89.

    python -m experiments.context --seeds 5

The facts of experiments/knowledge.py and SDFT's settings from there. For `?Acj=` the article `eh`
gives cj's attributes, the answer `b` their sum, both together `ehb`. "teacher" is the base's
accuracy when it reads that text.
"""

from data import toy
from experiments import runner
from experiments.common import base
from experiments.knowledge import facts_metrics
from experiments.settings import SDFT_FACTS
from train_toy import evaluate

TEXTS = {"answer only": "answer", "article only": "article", "both": "both"}
ARMS = {arm: dict(text=text, settings=SDFT_FACTS) for arm, text in TEXTS.items()}
COLUMNS = ["strict", "lenient", "OOD", "known", "teacher"]
WORLDS = [("facts",)]


def measure(seed, text, settings):
    start, sets = base(seed, "facts"), {"A": toy.facts("new", seed, reads=text)}
    teacher = evaluate(start, sets, "teacher_prompts", temperature=1.0)[0]["A"]
    return facts_metrics(start, seed, settings, teacher_reads=text) | {"teacher": teacher}


if __name__ == "__main__":
    runner.main("context")
