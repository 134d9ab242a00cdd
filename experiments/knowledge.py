"""Can it learn facts? The teacher reads an article and an answer about 20 unknown entities.

The paper (strict / lenient / other questions on the same facts, "OOD"): base 0/0/0, SFT 80/95/80,
SDFT 89/100/98, base with the article in its prompt 91/100/100. It does not report forgetting.

    python -m experiments.knowledge --seeds 5

Training asks `?cjA=`, the attributes of cj and their sum. Strict: all of the answer is correct;
lenient: the sum is. OOD asks `?cjB=`, for the difference, which is never trained on. "known" are
the 60 entities of pretraining, on both questions. The rates are chosen by a second run on 20 other
entities ("val strict", "val known"). "+ known" takes turns: after every update on the new facts
follows one of SDFT on prompts of known ones, with the base as the teacher, which then reads no
text; it reads question A only, so that "known" covers one it does not rehearse. Twice the updates,
then, and a frozen teacher, which "sdft, frozen teacher" has alone.
"""

import torch

from data import toy
from experiments import runner, verdicts
from experiments.common import base, train
from experiments.settings import HIGH, MIDDLE, grid
from train_toy import evaluate, sdft_step, sft_step


def and_known_step(student, teacher, optimizer, batch, generator, known, first, **settings):
    """`first` on new facts, then SDFT on as many known ones, which the base answers by itself."""
    rows = torch.randint(len(known), (len(batch["prompts"]),), generator=generator).numpy()
    loss = first(student, teacher, optimizer, batch, generator, **settings)
    prompts = dict(prompts=known[rows], teacher_prompts=known[rows])
    sdft_step(student, teacher, optimizer, batch | prompts, generator, alpha=0.0)
    return loss


FAMILIES = {
    "sft": dict(step=sft_step, rates=HIGH),
    "sdft": dict(step=sdft_step, rates=MIDDLE),
    "sdft, forward KL": dict(step=sdft_step, divergence="forward", rates=MIDDLE),
    "sdft, frozen teacher": dict(step=sdft_step, alpha=0.0, rates=MIDDLE),
    "sdft + known": dict(step=and_known_step, first=sdft_step, alpha=0.0, rates=MIDDLE),
    "sft + known": dict(step=and_known_step, first=sft_step, rates=HIGH),
}
ARMS = {"base": {}, "oracle": dict(read="article")}
ARMS |= {arm: dict(settings=settings) for arm, settings in grid(FAMILIES).items()}
COLUMNS = ["strict", "lenient", "OOD", "known", "val strict", "val known"]
WORLDS = [("facts",)]
SWEEP = ("val strict", "val known")


def measure(seed, settings=None, read=None):
    start = base(seed, "facts")
    if settings and settings["step"] is and_known_step:
        settings = settings | dict(known=toy.facts("known", seed)["prompts"])
    metrics = facts_metrics(start, seed, settings, read=read)
    if settings:
        other = facts_metrics(start, seed, settings, part="val")
        metrics |= {"val strict": other["strict"], "val known": other["known"]}
    return metrics


def facts_metrics(student, seed, settings=None, part="new", teacher_reads="both", read=None):
    """Train a copy of the student on one part of the facts, then ask it everything.

    `teacher_reads` is the text in the teacher's prompt, `read` one in the prompts when asked.
    """
    if settings:
        data = toy.facts(part, seed, reads=teacher_reads)
        student, _ = train(student, data, seed, **settings)
    asked = {"A": (part, "A"), "OOD": (part, "B"), "known A": ("known", "A")}
    asked["known B"] = ("known", "B")
    sets = {
        name: toy.facts(p, seed, question, read or "both") for name, (p, question) in asked.items()
    }
    prompts = "teacher_prompts" if read else "prompts"
    strict, length = evaluate(student, sets, prompts)
    lenient, _ = evaluate(student, sets, prompts, is_correct=toy.is_last_correct)
    sampled, _ = evaluate(student, sets, prompts, temperature=1.0)
    return {
        "strict": strict["A"],
        "lenient": lenient["A"],
        "OOD": strict["OOD"],
        "known": (strict["known A"] + strict["known B"]) / 2,
        "known A": strict["known A"],
        "known B": strict["known B"],
        "sampled": sampled["A"],
        "length": length["A"],
    }


def claims(at):
    scores = ("strict", "lenient", "OOD")
    sft, sdft = ({m: at(arm, m) for m in (*scores, "known")} for arm in ("sft", "sdft"))
    shown = [" / ".join(runner.mean_and_spread(of[m]) for m in scores) for of in (sft, sdft)]
    yield (
        "facts: SDFT answers other questions on them better (OOD; strict / lenient / OOD)",
        "SFT 80/95/80, SDFT 89/100/98, article in the prompt 91/100/100",
        "SFT {}; SDFT {}".format(*shown),
        verdicts.more(sdft["OOD"], sft["OOD"]),
    )
    yield (
        "SDFT learns more of the facts (strict)",
        "89 against 80",
        verdicts.against(sdft["strict"], sft["strict"]),
        verdicts.more(sdft["strict"], sft["strict"]),
    )
    yield (
        "SDFT keeps more of the known facts",
        "not reported",
        verdicts.against(sdft["known"], sft["known"]),
        verdicts.more(sdft["known"], sft["known"]),
    )
    for metric, what in (("OOD", "answers other questions better"), ("known", "keeps more")):
        pair = [at(arm, metric) for arm in ("sdft + known", "sft + known")]
        yield (
            f"if both take turns with known facts' prompts, SDFT {what} than SFT ({metric})",
            "not reported",
            verdicts.against(*pair),
            verdicts.more(*pair),
        )


if __name__ == "__main__":
    runner.main("knowledge")
