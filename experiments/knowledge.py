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

import copy

import numpy as np
import torch

from experiments import common, runner
from experiments.common import base, train
from experiments.settings import HIGH, MIDDLE, SDFT, SDFT_FORWARD, SFT, grid
from experiments.worlds import facts, is_last_correct
from sdft import clip_and_step
from train_toy import adamw, evaluate, sdft, set_learning_rate, sft


def measure(seed, settings=None, reads=None):
    """`reads` is a text in the prompts when asked."""
    start = base(seed, "facts")
    if settings:
        return taught(start, seed, settings)
    return scores(start, seed, reads=reads)


def taught(start, seed, settings, text="both"):
    """Scores after training on the new facts, and as "val" after training on others instead."""
    metrics = {}
    for part in ("val", "new"):
        data = facts(part, seed, reads=text)
        learn = take_turns if "rehearse" in settings else train
        student, _ = learn(start, data, seed, **settings)
        found = scores(student, seed, part)
        metrics |= found if part == "new" else {f"val {k}": found[k] for k in ("strict", "known")}
    return metrics


def take_turns(start, data, seed, *, method, lr, steps, rehearse):
    """As `train`, with an update on known facts after every one on new facts."""
    student, known = copy.deepcopy(start), facts("known", seed)["prompts"]
    optimizer = adamw(student, lr, weight_decay=0.0)
    rng, generator = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)
    steps = min(steps, 3) if common.options.quick else steps
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, lr, step, steps)
        rows = rng.choice(len(data["prompts"]), len(data["prompts"]), replace=False)
        new = {key: values[rows] for key, values in data.items()}
        asked = known[torch.randint(len(known), (len(rows),), generator=generator).numpy()]
        # On known facts the base is the teacher, and reads no text either.
        old = new | dict(prompts=asked, teacher_prompts=asked)
        for loss_of, batch in ((method, new), (sdft, old)):
            loss = loss_of(student, start, batch, generator)
            loss.backward()
            clip_and_step(student, optimizer, loss.item())
    return student, start


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


TURNS = dict(steps=160, rehearse=True)
METHODS = {"sft": SFT, "sdft": SDFT, "sdft, forward KL": SDFT_FORWARD}
METHODS |= {"sdft, frozen teacher": SDFT | dict(alpha=0.0)}
METHODS |= {"sdft + known": TURNS | dict(method=sdft), "sft + known": TURNS | dict(method=sft)}
RATES = {name: HIGH if name.startswith("sft") else MIDDLE for name in METHODS}
KNOWLEDGE = runner.Experiment(
    name="knowledge",
    arms=[dict(arm="base"), dict(arm="oracle", reads="article"), *grid(RATES, METHODS)],
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
    arms=[a for k, text in TEXTS.items() for a in grid({k: MIDDLE[1:]}, {k: SDFT}, text=text)],
    measure=measure_context,
    columns=["strict", "lenient", "OOD", "known", "teacher"],
    bases=[dict(world="facts")],
    choose_by=("val strict", "val known"),
)

if __name__ == "__main__":
    runner.main(__doc__, KNOWLEDGE, CONTEXT)
