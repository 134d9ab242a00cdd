"""search  A world in which an answer cannot be known, only tried."""

import numpy as np

from data import toy

ATTEMPTS = 5  # blind search finds one answer of two
SEARCH_SKILLS = "ABX"  # X has A's table; what is new about it is to go on after a failure
P_GIVE_UP = 0.6


def squares(seed):
    """The tables T of SEARCH_SKILLS, (3, 10, 10): each symbol once in every row and column.

    They are the cyclic group's with rows, columns and symbols renamed at random.
    """
    rng = np.random.default_rng([seed, 6])
    rows, columns, symbols = rng.permuted(np.tile(np.arange(10), (3, 2, 1)), axis=-1)  # (2, 10)
    places = (rows[:, :, None] + columns[:, None]) % 10  # (2, 10, 10)
    a, b = (names[place] for names, place in zip(symbols, places))
    return np.stack([a, b, a])


def tries(rng, table, right, place):
    """Responses that try symbols in random order until the right one: tokens (n, 2 ATTEMPTS + 1).

    table (n, 10) has every symbol's result, right (n,) the symbol that is looked for. It is tried
    after `place` (n,) others, if there are as many attempts.
    """
    n, rows = len(right), np.arange(len(right))
    order = rng.permuted(np.tile(np.arange(10), (n, 1)), axis=1)  # (n, 10)
    order[rows, (order == right[:, None]).argmax(1)] = order[rows, place]
    order[rows, place] = right
    tokens = np.full((n, 2 * ATTEMPTS + 1), toy.EOS)
    tokens[:, 0:-1:2] = order[:, :ATTEMPTS]
    tokens[:, 1::2] = table[rows[:, None], order[:, :ATTEMPTS]]
    return end_after(tokens, place + 1)


def end_after(tokens, attempts):
    """The responses, ended after this many attempts (n,) if they are longer."""
    return np.where(np.arange(tokens.shape[1]) < 2 * attempts[:, None], tokens, toy.EOS)


def search_batch(rng, n, seed):
    """n lines of pretraining. The first attempts fail and stand in the prompt, but for the result

    of the last: the table is learned at every place, and wrong attempts are no target.
    """
    told, forced = rng.random() < 0.3, rng.integers(ATTEMPTS + 1)
    skill, given, right = rng.integers((len(SEARCH_SKILLS), 10, 10), size=(n, 3)).T
    table = squares(seed)[skill, :, given]  # (n, 10)
    place = np.full(n, forced) if told else rng.integers(forced, 10, size=n)
    tokens = tries(rng, table, right, place)
    if not told:
        patience = max(forced, 1) + rng.geometric(P_GIVE_UP, n) - 1
        tokens = end_after(tokens, np.where(skill == 2, patience, ATTEMPTS))
    n_forced = max(0, 2 * forced - 1)
    prompts = ask_search(skill, given, right, table)["teacher_prompts" if told else "prompts"]
    return np.concatenate([prompts, tokens[:, :n_forced]], 1), tokens[:, n_forced:]


def ask_search(skill, given, right, table):
    """Prompts of both roles and the expert's answer, see `search`."""
    goal = table[np.arange(len(right)), right]
    question = toy.VOCAB.index("A") + np.array([toy.NAMES.index(k) for k in SEARCH_SKILLS])[skill]
    demonstrations = toy.side_by_side(right, goal, ".")
    return {
        "prompts": toy.side_by_side("?", question, given, goal, "="),
        "teacher_prompts": toy.side_by_side("?", question, given, goal, "!", demonstrations, "="),
        "demonstrations": demonstrations,
    }


def search(name, split, seed):
    """A skill's data in the form of `toy.skill`, of its 100 questions 40, 20 or 40.

    The answers are those of a blind search.
    """
    first, last = {"train": (0, 40), "val": (40, 60), "test": (60, 100)}[split]
    index = SEARCH_SKILLS.index(name)
    rng = np.random.default_rng([seed, 7, index])
    given, right = np.divmod(rng.permutation(100)[first:last], 10)
    table, skill = squares(seed)[index, :, given], np.full(last - first, index)
    place = rng.integers(10, size=last - first)
    answers = tries(rng, table, right, place)
    return ask_search(skill, given, right, table) | {"answers": answers}


def score_search(completions, prompts, seed):
    """What became of responses (n, C), filled up with EOS, to prompts (n, 5): {name: (n,)}.

    found     it ends, within ATTEMPTS, right after the symbol that was looked for
    attempts  how many it makes
    gave up   it ends before, without having found it
    honest    the share of its attempts with the right result, NaN without any
    """
    names = [toy.VOCAB.index(k) for k in SEARCH_SKILLS]
    skill = (prompts[:, 1:2] == names).argmax(1)
    table = squares(seed)[skill, :, prompts[:, 2]]  # (n, 10)
    n, width = len(prompts), 2 * ATTEMPTS + 1
    tokens = np.full((n, width), -1)
    tokens[:, : completions.shape[1]] = completions[:, :width]
    raise NotImplementedError
