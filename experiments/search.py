"""Where mistakes compound: the expert knows what the student can only find by trying.

The paper (Sec. 4.2, Fig. 6): off-policy training never visits the model's own mistakes, so on-policy
learns more than the same loss on the teacher's responses, and SFT on those less still. In the other
worlds here every error is fatal, or what follows it is no different. Here errors are all there is to
learn from: see "search" in worlds.py. The base can check an attempt, and on prior skills it tries
until it has found the answer, but on skill X it gives up after a failure.

    python -m experiments.search             # one seed at the chosen rates
    python -m experiments.search --seeds 5 --all_rates

Responses are sampled at temperature 1, to unseen questions of X, but for "greedy". "found": the right
symbol is the last of at most five; blind search finds .50. "gave up": it ends before, without it.
"prior" is the same on A and B, "honest" the share of attempts with the right result, "first" the
share of right first attempts, "by heart" the same on the training questions. "found at 20" is after
20 of the 160 updates. A base that fails `gates` is an error.

sdft                EMA teacher or frozen, reverse or forward KL
offline             the same loss on the teacher's responses
stale               on the base's, drawn once: on-policy at the start only
forced failures     on the teacher's, after 0 to 5 failures that it is made to begin with
sft                 on the expert's demonstrations, on the teacher's responses, or on demonstrations
                    of someone who has to search as well
"""

import itertools

import numpy as np
import torch

from data import toy
from experiments import report, runner, worlds
from experiments.common import base, options, training
from experiments.search_world import (
    ATTEMPTS,
    SEARCHED,
    score_search,
    search,
    search_batch,
    searches,
)
from experiments.settings import SDFT, SDFT_FORWARD, SFT, grid
from sdft import completion_logits, distill_loss, rollout
from train_toy import sft

worlds.WORLDS |= {"search": (search_batch, 1800)}
LOOKS = (5, 10, 20, 40, 80, 160)  # updates after which X's test questions are asked


# --- The arms ------------------------------------------------------------------------------------


def on_texts(student, teacher, batch, generator, texts, divergence="reverse"):
    """SDFT's loss on responses that were drawn before the training."""
    tokens = torch.from_numpy(batch[texts])  # (B, C)
    is_end = tokens == toy.EOS
    mask = is_end.cumsum(1) - is_end.long() == 0  # up to and including the first end token
    contexts = batch["prompts"], batch["teacher_prompts"]
    return distill_loss(student, teacher, *contexts, tokens, mask, divergence)[0]


def sft_on_texts(student, teacher, batch, generator, texts):
    return sft(student, teacher, batch | {"demonstrations": batch[texts]}, generator)


def draw_texts(start, data, seed):
    """Responses to the training questions (n, C) by the base in either role."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda prompts: respond(start, prompts, 1.0, generator)
    return {
        "base's": draw(data["prompts"]),
        "teacher's": draw(data["teacher_prompts"]),
        "after failures": draw_after_failures(draw, data, seed),
    }


def draw_after_failures(draw, data, seed):
    """The teacher's responses (n, C) that begin with 0 to ATTEMPTS failures."""
    rng, n = np.random.default_rng([seed, 8]), len(data["prompts"])
    failures = searches(rng, data["tables"], data["demonstrations"][:, 0], np.full(n, ATTEMPTS))
    begun = [row[: 2 * k] for row, k in zip(failures, rng.integers(ATTEMPTS + 1, size=n))]
    drawn = draw([[*prompt, *row] for prompt, row in zip(data["teacher_prompts"], begun)])
    texts = np.full((n, 2 * ATTEMPTS + drawn.shape[1]), toy.EOS)
    for text, first, rest in zip(texts, begun, drawn):
        text[: len(first) + len(rest)] = [*first, *rest]
    return texts[:, : 2 * ATTEMPTS + 1]


# --- Measuring -----------------------------------------------------------------------------------


def respond(model, prompts, temperature, generator=None):
    """Responses (n, C), as long as ATTEMPTS attempts and an end token at most."""
    n = 2 * ATTEMPTS + 1
    return rollout(model, prompts, n, toy.EOS, temperature, generator)[0].numpy()


def ask(model, data, times):
    """Means of `score_search` over so many sampled responses to each question; 0 is greedy."""
    data = {key: np.repeat(values, max(times, 1), 0) for key, values in data.items()}
    generator = torch.Generator().manual_seed(0)
    said = respond(model, data["prompts"], float(times > 0), generator)
    means = {name: values.mean() for name, values in score_search(said, data).items()}
    return means | {"honest": means["honest"] / max(means["attempts"], 1e-9)}


def after_failures(start, data, prompts):
    """Responses that fail until the end (n, C), and the next-token probabilities (n, C, V)."""
    rng, right = np.random.default_rng(0), data["demonstrations"][:, 0]
    tokens = searches(rng, data["tables"], right, np.full(len(right), ATTEMPTS))
    with torch.no_grad():
        logits = completion_logits(start, data[prompts], torch.from_numpy(tokens))
    return tokens, logits.softmax(-1).numpy()


def gates(start, seed, times=25):
    """What the base has to be able to do: {gate: (value, lowest, highest)}.

    honest       how often it takes the right result, of the worst skill at the worst place
    teacher      its probability of the right symbol after 0, 1, 2 ... failures, the worst
    prior found  what blind search finds, on the prior skills
    gives up     on X
    """
    honest = []
    for name in SEARCHED:
        tokens, probs = after_failures(start, search(name, "test", seed), "prompts")
        honest += [*(probs.argmax(-1) == tokens)[:, 1::2].mean(0)]
    data = search("X", "train", seed)
    _, probs = after_failures(start, data, "teacher_prompts")
    right = data["demonstrations"][:, :1, None]  # (n, 1, 1)
    teacher = np.take_along_axis(probs[:, 0:-1:2], right, 2).mean((0, 2))  # (ATTEMPTS,)
    blind = ATTEMPTS / 10
    prior = np.mean([ask(start, search(name, "train", seed), times)["found"] for name in "AB"])
    gives_up = ask(start, search("X", "test", seed), 10)["gave up"]
    return {
        "honest": (min(honest), 0.97, 1),
        "teacher": (min(teacher), 0.95, 1),
        "prior found": (prior, blind - 0.03, blind + 0.03),
        "gives up": (gives_up, 0.7, 1),
    }


def fit_base(seed):
    """The seed's base, and its gates as metrics. Raises ValueError if it fails one."""
    start = base(seed, "search")
    passed = gates(start, seed)
    for gate, (value, lowest, highest) in passed.items():
        if not lowest <= value <= highest and not options.quick:
            raise ValueError(
                f"the base of seed {seed} is not fit: {gate!r} is {value:.3f}, not {lowest:g} to "
                f"{highest:g}, and nothing can be measured on it; leave this seed out"
            )
    return start, {f"gate: {gate}": value for gate, (value, _, _) in passed.items()}


def measure(seed, settings=None):
    student, metrics = fit_base(seed)
    test = search("X", "test", seed)
    if settings is None:
        print(f"seed {seed}:", "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()), flush=True)
        return metrics | scores(student, test, seed)
    data = search("X", "train", seed)
    data |= draw_texts(student, data, seed)
    student, _, updates = training(student, data, seed, **settings)
    metrics, done = {}, 0
    for look in LOOKS:
        for _ in itertools.islice(updates, look - done):
            pass
        done = look
        metrics |= {f"{key} at {look}": value for key, value in ask(student, test, 10).items()}
    return metrics | scores(student, test, seed)


def scores(model, test, seed):
    train, val = search("X", "train", seed), search("X", "val", seed)
    prior = lambda split, times: [ask(model, search(k, split, seed), times) for k in "AB"]
    mean = lambda several: {key: np.mean([one[key] for one in several]) for key in several[0]}
    metrics = ask(model, test, 10)
    metrics |= {f"greedy {key}": value for key, value in ask(model, test, 0).items()}
    metrics |= {f"prior {key}": value for key, value in mean(prior("test", 5)).items()}
    metrics["prior greedy found"] = mean(prior("test", 0))["found"]
    metrics |= {"val found": ask(model, val, 20)["found"]}
    metrics |= {"val prior found": mean(prior("val", 10))["found"]}
    return metrics | {"by heart": ask(model, train, 5)["first"]}


# --- The experiments -----------------------------------------------------------------------------

OFFLINE = SDFT | dict(method=on_texts, texts="teacher's")
METHODS = {
    "sft": SFT,
    "sft, teacher's samples": SFT | dict(method=sft_on_texts, texts="teacher's"),
    "offline": OFFLINE,
    "offline, forward KL": OFFLINE | dict(divergence="forward"),
    "sdft": SDFT,
    "sdft, forward KL": SDFT_FORWARD,
    "sdft, frozen": SDFT | dict(alpha=0.0),
    "sdft, frozen, forward KL": SDFT_FORWARD | dict(alpha=0.0),
    "stale": OFFLINE | dict(texts="base's"),
    "forced failures": OFFLINE | dict(texts="after failures"),
    "sft, searching": SFT | dict(method=sft_on_texts, texts="answers"),
}
RATES = (2e-5, 6e-5, 2e-4, 6e-4)
CHOSEN = dict.fromkeys(METHODS, 6e-5)  # not chosen yet
HIGHEST = [
    dict(arm=f"{name}, highest rate", settings=METHODS[name] | dict(lr=RATES[-1]))
    for name in ("sft", "sdft")
]


def figure(rows, plt):
    drawn, panel = plt.subplots(figsize=(6.5, 4))
    before, updates = rows[0]["metrics"]["found"], [0, *LOOKS]
    for row in (row for row in rows if row["arm"] in METHODS):
        values = [before, *(row["metrics"][f"found at {look}"] for look in LOOKS)]
        report.line(panel, range(len(updates)), values, row["arm"], markersize=3)
    panel.axhline(ATTEMPTS / 10, color="black", linestyle=":", label="blind search")
    panel.set_xticks(range(len(updates)), updates)
    panel.set(xlabel="updates", ylabel="found, sampled, unseen questions", ylim=(0, 0.6))
    report.grid_and_legend(panel)
    return drawn


SEARCH = runner.Experiment(
    name="search",
    arms=[dict(arm="base"), *grid({k: [CHOSEN[k]] for k in METHODS}, METHODS), *HIGHEST],
    measure=measure,
    columns=["found", "greedy found", "attempts", "gave up", "honest", "prior found", "by heart"],
    bases=[dict(world="search")],
    figure=figure,
)
SEARCH_RATES = runner.Experiment(
    name="search_rates",
    arms=grid(dict.fromkeys(METHODS, RATES), METHODS),
    measure=measure,
    columns=["val found", "found", "gave up", "prior found", "by heart"],
    bases=[dict(world="search")],
    choose_by=("val found", "val prior found"),
)

if __name__ == "__main__":
    runner.main(__doc__, SEARCH_RATES, SEARCH)
