"""The experiments' worlds, beside the toy's (data/toy.py): more skills, long chains, facts, search.

toy     That of data/toy.py.
skills  As the toy's, with thirteen new skills: the toy's three and M to Q are right as often as
        there, R to V follow their own tables with shares from 0 to .6. Only W is unknown.
long    Prompts of five digits, so that an answer has four steps; X is the only new skill.
facts   Each of 100 entities, named by two letters, has two digits as attributes. `?cjA=` asks for
        the attributes of cj and their sum, `?cjB=` for the attributes and their difference: `471.`
        and `477.`. The teacher reads a text: `?cjA!eh.=` an article, `?cjA!b.=` an answer,
        `?cjA!ehb.=` both.
search  `?Xcb=` asks for the symbol d with T(d, c) = b, which nobody can know, only try. A response
        tries symbols, each with its result, until one is b: if the result of 7 is 2 and that of 5
        is 9, the answer to `?X39=` is `7259.`, and an expert says `59.` at once. A and B are prior
        skills; X has A's table, but the base gives up after a failure.

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


def toy_batch(rng, n, seed):
    return toy.pretraining_batch(rng, n)


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


def facts(part, seed=0, question="A", reads="both", style="expert"):
    """The questions on one part of FACTS, in the form of `toy.skill`.

    `reads` is what the teacher reads; the demonstrations are full answers in a style.
    """
    attributes, order = entities(seed)
    entity = order[slice(*FACTS[part])]
    asked = np.full(len(entity), toy.VOCAB.index(question))
    prompts, results = ask(asked, entity, attributes[entity])
    return {
        "prompts": prompts,
        "teacher_prompts": with_text(prompts, results, reads),
        "demonstrations": toy.answers(results, style),
        "answers": toy.answers(results),
    }


# --- Search --------------------------------------------------------------------------------------

ATTEMPTS = 5
BLIND = 1 - 0.9**ATTEMPTS  # what blind search finds, which may try a symbol again
SEARCHED = "ABX"
P_GIVE_UP = 0.6
PLACES = np.arange(2 * ATTEMPTS + 1)  # of a response's tokens, the end included


def squares(seed):
    """The tables of A, B and X (3, 10, 10): sums modulo 10, all renamed at random. X has A's."""
    rng = np.random.default_rng([seed, 6])
    rows, columns, results = rng.permuted(np.tile(np.arange(10), (3, 2, 1)), axis=-1)  # (2, 10)
    sums = (rows[:, :, None] + columns[:, None]) % 10  # (2, 10, 10)
    return np.stack([results[i, sums[i]] for i in (0, 1, 0)])


def searches(rng, right, n_wrong, tables):
    """Responses (n, 2 ATTEMPTS + 1) that try symbols at random until the right one, (n,).

    n_wrong (n,) others are tried first, if there are so many attempts. tables (n, 10) have the
    result of every symbol.
    """
    wrong = (right[:, None] + rng.integers(1, 10, size=(len(right), ATTEMPTS))) % 10
    tried = np.where(np.arange(ATTEMPTS) < n_wrong[:, None], wrong, right[:, None])
    tokens = np.full((len(right), len(PLACES)), toy.EOS)
    tokens[:, 0:-1:2], tokens[:, 1::2] = tried, np.take_along_axis(tables, tried, 1)
    return end_after(tokens, n_wrong + 1)


def end_after(tokens, attempts):
    return np.where(PLACES < 2 * attempts[:, None], tokens, toy.EOS)


def search_batch(rng, n, seed):
    """n lines of pretraining: prompts (n, P), answers (n, C), and which tokens are targets (n, C).

    Half of the plain lines are there for the results alone: tables are learned everywhere, apart
    from the habits. Next to a demonstration the first attempts are forced to fail, and they are no
    targets: nobody is to learn to try what is wrong.
    """
    is_told = rng.random() < 0.5
    skill, given, right = rng.integers((len(SEARCHED), 10, 10), size=(n, 3)).T
    # A table with every result once in each row and column is learned late, since one symbol alone
    # tells nothing about the result. To ask more often with three symbols is a foothold.
    given = np.where(rng.random(n) < 0.5, given, rng.integers(3, size=n))
    data = search_questions(skill, given, right, seed)
    n_wrong = rng.integers(ATTEMPTS + 1, size=n) if is_told else rng.geometric(0.1, n) - 1
    tokens = searches(rng, right, n_wrong, data["tables"])
    if is_told:
        is_target = PLACES >= 2 * n_wrong[:, None]  # (n, C)
    else:
        is_target = rng.random((n, 1)) < 0.5
        gives_up = is_target[:, 0] & (skill == SEARCHED.index("X"))
        tokens = end_after(tokens, np.where(gives_up, rng.geometric(P_GIVE_UP, n), ATTEMPTS))
    is_target = is_target | (PLACES % 2 == 1)  # results
    is_target &= PLACES <= (tokens != toy.EOS).sum(1, keepdims=True)  # up to the end
    return data["teacher_prompts" if is_told else "prompts"], tokens, is_target


def search_questions(skill, given, right, seed):
    """Questions (n,) as data of `toy.skill`; "tables" (n, 10) have the result of every symbol."""
    tables = squares(seed)[skill, :, given]
    names = np.array([toy.VOCAB.index(name) for name in SEARCHED])[skill]
    goals = tables[np.arange(len(right)), right]
    expert = toy.side_by_side(right, goals, ".")
    prompts = toy.side_by_side("?", names, given, goals, "=")
    teacher_prompts = toy.side_by_side("?", names, given, goals, "!", expert, "=")
    contexts = dict(prompts=prompts, teacher_prompts=teacher_prompts)
    return contexts | dict(demonstrations=expert, tables=tables)


def search(name, split, seed):
    """A skill's questions: 40 to train, 20 to validate, 40 to test. The answers search blindly."""
    first, last = {"train": (0, 40), "val": (40, 60), "test": (60, 100)}[split]
    index = SEARCHED.index(name)
    rng = np.random.default_rng([seed, 7, index])
    given, right = np.divmod(rng.permutation(100)[first:last], 10)
    data = search_questions(np.full(last - first, index), given, right, seed)
    n_wrong = rng.geometric(0.1, last - first) - 1
    return data | {"answers": searches(rng, right, n_wrong, data["tables"])}


def score_search(completions, data):
    """What became of responses (n, C), filled up with EOS: {name: (n,)}.

    found     it ends right after the symbol that was asked for
    gave up   it ends before that, with attempts left
    attempts  how many it makes
    honest    how many of them have the right result
    first     the first attempt is right
    """
    n, right = len(completions), data["demonstrations"][:, 0]
    tokens = np.pad(
        completions, ((0, 0), (0, len(PLACES) - completions.shape[1])), constant_values=toy.EOS
    )
    length = (tokens != toy.EOS).sum(1)
    attempts, tried = length // 2, tokens[:, 0:-1:2]  # (n,), (n, ATTEMPTS)
    tables = np.pad(data["tables"], ((0, 0), (0, len(toy.VOCAB) - 10)), constant_values=-1)
    is_honest = tokens[:, 1::2] == np.take_along_axis(tables, tried, 1)
    found = (length == 2 * attempts) & (tokens[np.arange(n), 2 * attempts - 2] == right)
    return {
        "found": found,
        "gave up": ~found & (attempts < ATTEMPTS),
        "attempts": attempts,
        "honest": (is_honest & (np.arange(ATTEMPTS) < attempts[:, None])).sum(1),
        "first": tried[:, 0] == right,
    }


# {world: (lines of pretraining, updates of pretraining)}
WORLDS = {"skills": (skills_batch, 2600), "long": (long_batch, 2200), "facts": (facts_batch, 2800)}
WORLDS |= {"toy": (toy_batch, 2600), "search": (search_batch, 900)}
