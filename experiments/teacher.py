"""Is the demonstration-conditioned teacher good, and close to the base?

The paper (ToolAlpaca): the base is right 42%, the teacher 100%; KL to the base: SFT 1.26 nats,
teacher 0.68.

    python -m experiments.teacher --seeds 5

KL to the base on the prompts of skill X (which the base reads without a demonstration), in nats
per response.
"""

from experiments import runner
from experiments.common import base, kl_to_base, skill, train_on_skill
from experiments.settings import SDFT, SDFT_FORWARD, SFT, SFT_OWN
from train_toy import evaluate

ARMS = {
    "base": {},
    "teacher": dict(read="teacher_prompts"),
    "sft": dict(settings=SFT),
    "sft, own style": dict(settings=SFT_OWN),
    "sdft": dict(settings=SDFT),
    "sdft, forward KL": dict(settings=SDFT_FORWARD),
}
COLUMNS = ["accuracy", "KL"]
WORLDS = [("skills",)]


def measure(seed, settings=None, read="prompts"):
    start, test = base(seed), skill("X", "test", seed)
    model = train_on_skill(start, seed, settings)
    accuracy = evaluate(model, {"X": test}, read, temperature=1.0)[0]["X"]
    return {"accuracy": accuracy, "KL": kl_to_base(start, model, test["prompts"], test[read])}


if __name__ == "__main__":
    runner.main("teacher")
