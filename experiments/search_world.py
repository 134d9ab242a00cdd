"""search  The answer of `?Xcb=` is the symbol d with T(d, c) = b, which nobody can know, only try. A
response tries symbols, each with its result, until one is b: `72559.` if T(7, c) = 2,
T(5, c) = b ...
"""

import numpy as np

from data import toy

ATTEMPTS = 5  # of ten symbols: blind search finds one answer of two
SEARCHED = "ABX"
P_GIVE_UP = 0.6


def squares(seed):
    """The tables T of A, B and X (3, 10, 10): each result once in every row and column.

    They are sums modulo 10 with rows, columns and results renamed at random. X has A's.
    """
    rng = np.random.default_rng([seed, 6])
    rows, columns, results = rng.permuted(np.tile(np.arange(10), (3, 2, 1)), axis=-1)  # (2, 10)
    sums = (rows[:, :, None] + columns[:, None]) % 10  # (2, 10, 10)
    return np.stack([results[0, sums[0]], results[1, sums[1]], results[0, sums[0]]])


def searches(rng, tables, right, n_before):
    """Responses (n, 2 ATTEMPTS + 1) that try symbols in random order, and end with the right one.

    tables (n, 10) have every symbol's result. The right symbols (n,) are tried after n_before (n,)
    others, if there are as many attempts.
    """
    rows = np.arange(len(right))
    order = rng.permuted(np.tile(np.arange(10), (len(right), 1)), axis=1)  # (n, 10)
    order[rows, (order == right[:, None]).argmax(1)] = order[rows, n_before]
    order[rows, n_before] = right
    order = order[:, :ATTEMPTS]
    tokens = np.full((len(right), 2 * ATTEMPTS + 1), toy.EOS)
    tokens[:, 0:-1:2], tokens[:, 1::2] = order, tables[rows[:, None], order]
    return end_after(tokens, n_before + 1)


def end_after(tokens, attempts):
    """The responses, ended after so many attempts (n,), if they are not over by then."""
    return np.where(np.arange(tokens.shape[1]) < 2 * attempts[:, None], tokens, toy.EOS)


def search_batch(rng, n, seed):
    """n lines of pretraining: prompts (n, P), answers (n, C), and which tokens are targets (n, C).

    Most plain lines are there for the results alone: the tables are learned at every place, apart
    from the habits. Next to a demonstration the first attempts are forced to fail; they are no
    targets, so that nobody learns to try what is wrong.
    """
    is_told = rng.random() < 0.3
    skill, given, right = rng.integers((len(SEARCHED), 10, 10), size=(n, 3)).T
    # In a table with every result once in each row and column, one symbol alone tells nothing, and
    # such tables are learned late. Asking more often with three symbols tells something.
    given = np.where(rng.random(n) < 0.5, given, rng.integers(3, size=n))
    tables = squares(seed)[skill, :, given]  # (n, 10)
    n_before = rng.integers(ATTEMPTS + 1 if is_told else 10, size=n)
    tokens = searches(rng, tables, right, n_before)
    is_result = np.arange(tokens.shape[1]) % 2 == 1  # (C,)
    if is_told:
        is_habit = np.arange(tokens.shape[1]) >= 2 * n_before[:, None]  # (n, C)
    else:
        is_habit = rng.random((n, 1)) < 0.3
        gives_up = is_habit[:, 0] & (skill == SEARCHED.index("X"))
        tokens = end_after(tokens, np.where(gives_up, rng.geometric(P_GIVE_UP, n), ATTEMPTS))
    is_answer = np.cumsum(tokens == toy.EOS, 1) - (tokens == toy.EOS) == 0
    questions = search_questions(skill, given, right, tables)
    prompts = questions["teacher_prompts" if is_told else "prompts"]
    return prompts, tokens, (is_result | is_habit) & is_answer


def search_questions(skill, given, right, tables):
    names = np.array([toy.VOCAB.index(name) for name in SEARCHED])[skill]
    goals = tables[np.arange(len(right)), right]
    demonstrations = toy.side_by_side(right, goals, ".")
    return {
        "prompts": toy.side_by_side("?", names, given, goals, "="),
        "teacher_prompts": toy.side_by_side("?", names, given, goals, "!", demonstrations, "="),
        "demonstrations": demonstrations,
        "tables": tables,
    }


def search(name, split, seed):
    """A skill's questions in the form of `toy.skill`: 40 to train, 20 to validate, 40 to test.

    The demonstrations are the expert's, who knows the symbol. The answers are a blind search's.
    "tables" (n, 10) have the result of every symbol.
    """
    first, last = {"train": (0, 40), "val": (40, 60), "test": (60, 100)}[split]
    skill = np.full(last - first, SEARCHED.index(name))
    rng = np.random.default_rng([seed, 7, skill[0]])
    given, right = np.divmod(rng.permutation(100)[first:last], 10)
    tables = squares(seed)[skill, :, given]
    answers = searches(rng, tables, right, rng.integers(10, size=last - first))
    return search_questions(skill, given, right, tables) | {"answers": answers}


def score_search(completions, data):
    """What became of responses (n, C) to the questions: {name: (n,)}.

    found     it ends right after the symbol that was asked for
    gave up   it ends before that, with attempts left
    attempts  how many it made
    honest    how many of them have the right result
    first     the first attempt is right
    """
    n, right = len(completions), data["demonstrations"][:, 0]
    tokens = np.full((n, 2 * ATTEMPTS + 1), toy.EOS)
    tokens[:, : completions.shape[1]] = completions[:, : tokens.shape[1]]
    length = (tokens != toy.EOS).sum(1)  # filled up with EOS
    attempts = np.minimum(length // 2, ATTEMPTS)
    tried, results = tokens[:, 0:-1:2], tokens[:, 1::2]  # (n, ATTEMPTS)
    is_attempt = np.arange(ATTEMPTS) < attempts[:, None]
    tables = np.pad(data["tables"], ((0, 0), (0, len(toy.VOCAB) - 10)), constant_values=-1)
    is_honest = results == np.take_along_axis(tables, tried, 1)
    last = tried[np.arange(n), np.maximum(attempts, 1) - 1]
    found = (attempts > 0) & (length == 2 * attempts) & (last == right)
    return {
        "found": found,
        "gave up": ~found & (attempts < ATTEMPTS),
        "attempts": attempts,
        "honest": (is_honest & is_attempt).sum(1),
        "first": tried[:, 0] == right,
    }
