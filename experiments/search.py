"""Where mistakes compound: the expert knows what the student can only find by trying.

The paper (Sec. 4.2, Fig. 6): off-policy training never visits the model's own mistakes; on-policy
learns more than the same loss on the teacher's responses, and SFT on those less still. In the world
"search" (worlds.py) mistakes are all that there is to learn from: on prior skills the base tries
until it has found the answer, on skill X it gives up after a failure.

    python -m experiments.search --seeds 5
    python -m experiments.search search    # at the chosen rates only, one seed: a few minutes

search        "offline" has SDFT's loss on the teacher's responses, "stale" on the base's, drawn
              once, "forced failures" on the teacher's after 0 to 5 failures; "sft, searching" is
              SFT on demonstrations of someone who has to search as well
search_rates  The same at every rate; `CHOSEN` is by seed 0's validation questions

Questions are unseen and asked ten times at temperature 1. "found": the right symbol is the last of
at most five; blind search finds .41. "gave up": it ends before that. "honest" is the share of
attempts with the right result, "train first" of right first attempts on the training questions:
what is known by heart. "prior" is on A and B. A base that fails one of the `gates` is an error.
"""

import functools
import itertools

import numpy as np
import torch

from data import toy
from experiments import runner
from experiments.common import base, on_texts, options, sft_on_texts, training
from experiments.settings import SDFT, SDFT_FORWARD, SFT, grid
from experiments.worlds import ATTEMPTS, BLIND, SEARCHED, score_search, search, searches
from sdft import completion_logits, rollout

# Updates after which X's test questions are asked. The last is the end.
LOOKS = (5, 10, 20, 40, 80, 160)

GATES = {  # what a base has to be able to do: lowest and highest value
    "honest": (0.97, 1),  # right results after 0 to 4 failures, the worst skill and place
    "teacher": (0.95, 1),  # probability of the right symbol after 0 to 4 failures, the worst
    "prior found": (BLIND - 0.03, BLIND + 0.03),  # what blind search finds
    "gives up": (0.7, 1),  # on X
}

# --- The arms ------------------------------------------------------------------------------------


def draw_texts(start, data, seed):
    """Responses to the training questions (n, C) by the base in either role, drawn once.

    "after failures" are the teacher's that begin with 0 to ATTEMPTS failures.
    """
    rng, n = np.random.default_rng([seed, 8]), len(data["prompts"])
    failures = searches(rng, data["demonstrations"][:, 0], np.full(n, ATTEMPTS), data["tables"])
    begun = [row[: 2 * k] for row, k in zip(failures, rng.integers(ATTEMPTS + 1, size=n))]
    told = [[*prompt, *row] for prompt, row in zip(data["teacher_prompts"], begun)]
    generator = torch.Generator().manual_seed(seed)
    read = data["prompts"], data["teacher_prompts"], told
    base, teacher, rest = (respond(start, prompts, 1.0, generator) for prompts in read)
    ends = [toy.EOS] * (2 * ATTEMPTS)  # fill up the shortest
    after = [[*first, *then, *ends][: 2 * ATTEMPTS + 1] for first, then in zip(begun, rest)]
    return {"base's": base, "teacher's": teacher, "after failures": np.array(after)}


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
    tokens = searches(rng, right, np.full(len(right), ATTEMPTS), data["tables"])
    with torch.no_grad():
        logits = completion_logits(start, data[prompts], torch.from_numpy(tokens))
    return tokens, logits.softmax(-1).numpy()


def gates(start, seed, times=25):
    """What GATES name, of a base."""
    honest = []
    for name in SEARCHED:
        tokens, probs = after_failures(start, search(name, "test", seed), "prompts")
        honest += [*(probs.argmax(-1) == tokens)[:, 1::2].mean(0)]  # by place
    data = search("X", "train", seed)
    right = data["demonstrations"][:, :1, None]  # (n, 1, 1)
    probs = after_failures(start, data, "teacher_prompts")[1][:, 0:-1:2]  # (n, ATTEMPTS, V)
    return {
        "honest": min(honest),
        "teacher": np.take_along_axis(probs, right, 2).mean((0, 2)).min(),
        "prior found": ask(start, prior_questions("train", seed), times)["found"],
        "gives up": ask(start, search("X", "test", seed), 10)["gave up"],
    }


@functools.cache
def fit_base(seed):
    """The seed's base, and its gates as metrics. Raises ValueError if it fails one."""
    start = base(seed, "search")
    passed = gates(start, seed)
    for gate, (lowest, highest) in GATES.items():
        if not lowest <= passed[gate] <= highest and not options.quick:
            raise ValueError(
                f"the base of seed {seed} is not fit: {gate!r} is {passed[gate]:.3f}, not {lowest} "
                f"to {highest}, and nothing can be measured on it; leave this seed out"
            )
    return start, {f"gate: {gate}": value for gate, value in passed.items()}


def measure(seed, settings=None):
    start, passed = fit_base(seed)
    if settings is None:
        print(f"seed {seed}:", "  ".join(f"{k} {v:.3f}" for k, v in passed.items()), flush=True)
        return passed | scores(start, seed)
    data = search("X", "train", seed)
    data |= draw_texts(start, data, seed)
    student, _, updates = training(start, data, seed, **settings)
    test, metrics = search("X", "test", seed), {}
    for done, look in itertools.pairwise([0, *LOOKS]):
        for _ in itertools.islice(updates, look - done):
            pass
        metrics |= {f"{key} at {look}": value for key, value in ask(student, test, 10).items()}
    return metrics | scores(student, seed)


def scores(model, seed):
    """`ask` of all questions, sampled 5 to 20 times and greedy."""
    ask_x = lambda split, times: ask(model, search("X", split, seed), times)
    ask_prior = lambda split, times: ask(model, prior_questions(split, seed), times)
    asked = {"": ask_x("test", 10), "greedy ": ask_x("test", 0), "train ": ask_x("train", 5)}
    asked |= {"prior ": ask_prior("test", 5), "prior greedy ": ask_prior("test", 0)}
    asked |= {"val ": ask_x("val", 20), "val prior ": ask_prior("val", 10)}
    return {prefix + key: value for prefix, said in asked.items() for key, value in said.items()}


def prior_questions(split, seed):
    a, b = (search(name, split, seed) for name in "AB")
    return {key: np.concatenate([a[key], b[key]]) for key in a}


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
RATES = (6e-6, 2e-5, 6e-5, 2e-4, 6e-4)
TOLD = ("sft", "sft, teacher's samples", "offline", "offline, forward KL")
# By `search_rates`. What learns from texts without a failure finds most at the lowest rate.
CHOSEN = dict.fromkeys(METHODS, 6e-5) | dict.fromkeys(TOLD, 6e-6)
CHOSEN |= dict.fromkeys(["stale", "forced failures"], 2e-5)
ARMS = [dict(arm="base"), *grid({name: [rate] for name, rate in CHOSEN.items()}, METHODS)]
for name in TOLD:
    ARMS += [dict(arm=f"{name}, at SDFT's rate", settings=METHODS[name] | dict(lr=6e-5))]
for name in ("sft", "sdft"):
    ARMS += [dict(arm=f"{name}, highest rate", settings=METHODS[name] | dict(lr=RATES[-1]))]


def figure(rows, plt):
    drawn, panel = plt.subplots(figsize=(6.5, 4))
    before, updates = rows[0]["metrics"]["found"], [0, *LOOKS]
    hidden = {"sft, teacher's samples", "sdft, frozen", "sdft, frozen, forward KL"}  # as others
    for row in (row for row in rows if row["arm"] in {*METHODS} - hidden):
        values = [before, *(row["metrics"][f"found at {look}"] for look in LOOKS)]
        line = "--o" if row["arm"] in TOLD else "-o"
        panel.plot(np.mean(values, 1), line, label=row["arm"], markersize=3)
    panel.axhline(BLIND, color="black", linestyle=":", label="blind search")
    panel.set_xticks(range(len(updates)), updates)
    panel.set(xlabel="updates", ylabel="found, sampled, unseen questions", ylim=(0, 0.6))
    return drawn


SEARCH = runner.Experiment(
    name="search",
    arms=ARMS,
    measure=measure,
    columns=["found", "greedy found", "gave up", "honest", "prior found", "prior gave up"],
    bases=[dict(world="search")],
    figure=figure,
)
SEARCH_RATES = runner.Experiment(
    name="search_rates",
    arms=grid(dict.fromkeys(METHODS, RATES), METHODS),
    measure=measure,
    columns=["val found", "found", "gave up", "prior found", "train first"],
    bases=[dict(world="search")],
    choose_by=("val found", "val prior found"),
)

if __name__ == "__main__":
    runner.main(__doc__, SEARCH_RATES, SEARCH)
