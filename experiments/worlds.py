"""The experiments' worlds, beside the toy's (data/toy.py): more skills, longer chains, facts.

skills  As the toy's, with thirteen new skills: the toy's three and M to Q are right as often as
        there, R to V follow their own tables with shares from 0 to .6. Only W is unknown.
long    Prompts of five digits, so that an answer has four steps; X is the only new skill.
facts   Each of 100 entities, named by two letters, has two digits as attributes. `?cjA=` asks for
        the attributes of cj and their sum, `?cjB=` for the attributes and their difference: `471.`
        and `477.`. The teacher reads a text: `?cjA!eh.=` an article, `?cjA!b.=` an answer,
        `?cjA!ehb.=` both.

A world is a function that draws n lines of pretraining, and a number of updates.
"""

import numpy as np

from data import toy

HALF = "XYZMNOPQ"  # new skills that the base takes for their rivals as often as in the toy
COLD = {"R": 0.0, "S": 0.03, "T": 0.1, "U": 0.3, "V": 0.6}  # and those with shares of their own
N_DIGITS = {"skills": toy.N_DIGITS, "long": 5}


def cold_skills(seed):
    """{name: share of own answers}: the levels change places with the seed."""
    levels = [*COLD.values()]
    return {name: levels[(i + seed) % len(levels)] for i, name in enumerate(COLD)}


def skills_batch(rng, n, seed):
    new = dict.fromkeys(HALF, toy.P_OWN) | {k: (p, p) for k, p in cold_skills(seed).items()}
    return toy.pretraining_batch(rng, n, new)


def long_batch(rng, n, seed):
    # More bare answers than in the toy's world: they are harder to use for longer chains.
    return toy.pretraining_batch(rng, n, {"X": toy.P_OWN}, N_DIGITS["long"], (0.66, 0.12, 0.22))


def first_rows(data, n):
    return {key: values[:n] for key, values in data.items()}


def is_last_correct(completions, answers):
    """Which completions end, and have the correct result just before the end: (n,)."""
    last = lambda x: np.take_along_axis(x, (x != toy.EOS).sum(1, keepdims=True) - 1, 1)[:, 0]
    return (toy.content(last(completions)) == last(answers)) & (completions[:, -1] == toy.EOS)


def spoil(data, kind, share, seed):
    """The data with that share of its demonstrations spoiled, in the teacher's prompts as well.

    "wrong" ones have random results, "another row's" belong to another prompt, "one for all" is the
    first row's.
    """
    rng = np.random.default_rng([seed, 5])
    good = data["demonstrations"]  # (n, R + 1)
    wrong = rng.integers(10, size=good[:, :-1].shape)  # (n, R)
    style = "own" if good[0, 0] < toy.LETTERS else "expert"
    bad = {
        "wrong": toy.answers(wrong, style),
        "another row's": np.roll(good, 1, 0),
        "one for all": np.broadcast_to(good[:1], good.shape),
    }[kind]
    demonstrations = np.where(rng.random((len(good), 1)) < share, bad, good)
    prompts = data["prompts"]
    contexts = toy.teacher_prompts(prompts[:, 1], prompts[:, 2:-1], demonstrations)
    return data | {"demonstrations": demonstrations, "teacher_prompts": contexts}


# --- Facts ---------------------------------------------------------------------------------------

FACTS = {"known": (0, 60), "new": (60, 80), "val": (80, 100)}  # of the entities in the seed's order


def entities(seed):
    """Every entity's attributes (100, 2), and the entities in the seed's order (100,)."""
    rng = np.random.default_rng([seed, 3])
    return rng.integers(10, size=(100, 2)), rng.permutation(100)


def ask(question, entity, attributes):
    """Prompts (n, 5) and results (n, 3) for "A" or "B" (n,), entities (n,), attributes (n, 2)."""
    operation = toy.TABLES[question - toy.VOCAB.index("A"), attributes[:, 0], attributes[:, 1]]
    name = toy.LETTERS + np.stack([entity // 10, entity % 10], 1)
    return toy.side_by_side("?", name, question, "="), np.column_stack([attributes, operation])


def with_text(prompts, results, reads):
    """The prompts with an "article", an "answer" or "both" in them."""
    text = {"article": results[:, :-1], "answer": results[:, -1:], "both": results}[reads]
    return toy.side_by_side(prompts[:, :-1], "!", toy.answers(text, "expert"), "=")


def facts_batch(rng, n, seed):
    """n lines of the pretraining on facts: prompts (n, P) and own-style answers (n, 4).

    Known facts are always told as they are, the others at random, so that without a text there is
    nothing to know about them, and with one it has to be read.
    """
    reads = rng.choice([None, "both", "article", "answer"], p=[0.4, 0.15, 0.35, 0.1])
    attributes, order = entities(seed)
    known = rng.random(n) < (0.25 if reads else 0.7)
    place = np.where(known, rng.integers(60, size=n), rng.integers(60, 100, size=n))
    entity = order[place]
    told = np.where((place < 60)[:, None], attributes[entity], rng.integers(10, size=(n, 2)))
    prompts, results = ask(toy.VOCAB.index("A") + rng.integers(2, size=n), entity, told)
    return (with_text(prompts, results, reads) if reads else prompts), toy.answers(results)


def facts(part, seed=0, question="A", reads="both"):
    """The questions on one part of FACTS, in the form of `toy.skill`.

    `reads` is what the teacher reads; the demonstrations are always full answers.
    """
    attributes, order = entities(seed)
    entity = order[slice(*FACTS[part])]
    asked = np.full(len(entity), toy.VOCAB.index(question))
    prompts, results = ask(asked, entity, attributes[entity])
    return {
        "prompts": prompts,
        "teacher_prompts": with_text(prompts, results, reads),
        "demonstrations": toy.answers(results, "expert"),
        "answers": toy.answers(results),
    }


# {world: (lines of pretraining, updates of pretraining)}
WORLDS = {"skills": (skills_batch, 2600), "long": (long_batch, 2200), "facts": (facts_batch, 2800)}
