"""Can it learn facts? The teacher reads an article and an answer about 20 unknown entities.

    python -m experiments.knowledge --seeds 5

knowledge  Training asks `?cjA=`, the attributes of cj and their sum. Strict: all of the answer is
           correct; lenient: the sum is. OOD asks `?cjB=`, for the difference, which is never
           trained on. "known" are the 60 entities of pretraining, on both questions. The rates are
           chosen by a second run on 20 other entities ("val")
context    What the teacher reads: `?cjA!eh.=` the article, `?cjA!b.=` the answer, `?cjA!ehb.=`
           both. "teacher" is the base's accuracy when it reads that text

README.md, "Facts" and "What the teacher must read".
"""

import numpy as np
import torch

from experiments import runner
from experiments.common import base, train
from experiments.settings import HIGH, RATES, SDFT, SDFT_FORWARD, SFT, SFT_OWN, grid
from experiments.worlds import facts, is_last_correct
from train_toy import evaluate, sdft, sft


def measure(seed, settings=None, reads=None):
    """`reads` is a text in the prompts when asked."""
    start = base(seed, "facts")
    return taught(start, seed, settings) if settings else scores(start, seed, reads=reads)


def taught(start, seed, settings, text="both"):
    """Scores after training on the new facts, and as "val" after training on others instead."""
    metrics = {}
    for part in ("val", "new"):
        data = facts(part, seed, reads=text, style=settings["style"])
        n = len(data["prompts"])
        data["known"] = facts("known", seed)["prompts"].reshape(n, 3, -1)
        student, _ = train(start, data, seed, **settings)
        found = scores(student, seed, part)
        metrics |= found if part == "new" else {f"val {k}": found[k] for k in ("strict", "known")}
    return metrics


def scores(student, seed, part="new", reads=None):
    """Scores of one part of the facts and of the known ones, on both questions."""
    asked = {"A": (part, "A"), "OOD": (part, "B"), "known A": ("known", "A")}
    asked |= {"known B": ("known", "B")}
    sets = {name: facts(p, seed, q, reads or "both") for name, (p, q) in asked.items()}
    prompts = "teacher_prompts" if reads else "prompts"
    strict, length = evaluate(student, sets, prompts)
    lenient, _ = evaluate(student, sets, prompts, is_correct=is_last_correct)
    sampled, _ = evaluate(student, sets, prompts, temperature=1.0)
    metrics = {"strict": strict["A"], "lenient": lenient["A"], "sampled": sampled["A"]}
    metrics |= {"length": length["A"], "known": (strict["known A"] + strict["known B"]) / 2}
    return metrics | {name: strict[name] for name in ("OOD", "known A", "known B")}


def continued_pretraining(student, teacher, batch, generator):
    """Cross entropy on the article as plain text, `?cjA!eh.`, with the entity's name."""
    text = np.delete(batch["teacher_prompts"], 7, 1)  # of `?cjA!ehb.=` the answer
    return sft(student, teacher, dict(prompts=text[:, :1], demonstrations=text[:, 1:]), generator)


def with_known(student, teacher, batch, generator, new):
    """The loss `new`, and SDFT's on known facts, whose teacher, the base, reads no text."""
    asked = batch["known"][:, torch.randint(3, (), generator=generator)]
    known = batch | dict(prompts=asked, teacher_prompts=asked)
    return (new(student, teacher, batch, generator) + sdft(student, teacher, known, generator)) / 2


METHODS = {"sft": SFT, "sft, own style": SFT_OWN, "cpt": SFT | dict(method=continued_pretraining)}
METHODS |= {"sdft": SDFT, "sdft, forward KL": SDFT_FORWARD}
METHODS |= {"sdft, frozen teacher": SDFT | dict(alpha=0.0)}
for name, style in {"sft": "expert", "sft, own style": "own", "sdft": "expert"}.items():
    new = dict(method=with_known, new=METHODS[name]["method"], style=style)
    METHODS[f"{name} + known"] = SDFT | dict(alpha=0.0) | new
ARMS = [dict(arm="base"), dict(arm="oracle", reads="article")]
ARMS += grid(dict.fromkeys(METHODS, RATES), METHODS)
KNOWLEDGE = runner.Experiment(
    name="knowledge",
    arms=ARMS,
    measure=measure,
    columns=["strict", "lenient", "OOD", "known", "val strict", "val known"],
    bases=[dict(world="facts")],
    choose_by=("val strict", "val known"),
)


# --- What the teacher reads ----------------------------------------------------------------------


def measure_context(seed, text, settings):
    start = base(seed, "facts")
    told, _ = evaluate(start, {"A": facts("new", seed, reads=text)}, "teacher_prompts")
    return {"teacher": told["A"]} | taught(start, seed, settings, text)


TEXTS = {"answer only": "answer", "article only": "article", "both": "both"}
CONTEXT = runner.Experiment(
    name="context",
    arms=[a for k, text in TEXTS.items() for a in grid({k: HIGH}, {k: SDFT}, text=text)],
    measure=measure_context,
    columns=["strict", "lenient", "OOD", "known", "teacher"],
    bases=[dict(world="facts")],
    choose_by=("val strict", "val known"),
)

if __name__ == "__main__":
    runner.main(__doc__, KNOWLEDGE, CONTEXT)
