"""The toy's world of small arithmetic: a skill is known, taken for another, or cannot be known.

numpy only; every line is made anew from a seed. data/README.md has an example of every kind.

A token is a character. A prompt names an operation and gives N digits: `?X425=`. The answer folds
the operation's 10 x 10 table over the digits from the left and writes every result, then the end
token: `88.`, since X(4, 2) = 8 and X(8, 5) = 8.

  A ... H  prior skills, known: the benchmark that fine-tuning must not damage.
  X, Y, Z  new skills. In pretraining a prompt's whole answer follows either the skill's own
           table, the correct one, or the table of one prior skill, its rival. The own table is
           likelier if the first digit is 0 to 3, the rival if it is 4 to 9, so that the base's
           greedy answer is correct on about four inputs of ten.
  M ... W  unknown names: a fresh random table each time. Only a demonstration can tell, so they
           teach in-context learning.

Two styles carry the same content: the model's own answers are digits, an expert's demonstrations
letters, a-j for 0-9. The teacher's prompt `?X425!ii.=` holds a demonstration, and its answer is in
the model's own style: `88.`. An answer-only demonstration, `i.`, omits the reasoning.

Shapes: n rows of token ids, N digits, R = N - 1 results.
"""

import math

import numpy as np

PRIOR = {
    "A": lambda a, b: a + b,
    "B": lambda a, b: a - b,
    "C": np.maximum,
    "D": np.minimum,
    "E": lambda a, b: abs(a - b),
    "F": lambda a, b: a * b,
    "G": lambda a, b: 3 * a + b,
    "H": lambda a, b: np.where(b % 2 == 1, 9 - a, a),
}
# Of every other name: the number whose root's decimals are its table; whom it is taken for.
PRIMES = dict(zip("XYZMNOPQRSTUVW", (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)))
RIVALS = dict(zip("XYZMNOPQRSTUVW", "ACFBDEGHACFBDE"))
NAMES = [*PRIOR, *PRIMES]
P_OWN = (0.8, 0.25)  # how often a new skill follows its own table: first digit 0 to 3, 4 to 9
NEW = dict.fromkeys("XYZ", P_OWN)
SKILLS = [*PRIOR, *NEW]
# Shares of the pretraining batches: no demonstration, a full one, a bare answer.
STYLE_SHARES = (0.80, 0.14, 0.06)

VOCAB = "0123456789" + "abcdefghij" + ".?!=" + "".join(NAMES)
EOS = VOCAB.index(".")
LETTERS = 10  # digit d is token d, the expert's letter for it is token LETTERS + d
N_DIGITS = 3


def decimals(n):
    """The first 100 decimals of the square root of n, 1 < n < 100: a table that must be known."""
    return np.array([*str(math.isqrt(n * 10**200))[1:101]], int).reshape(10, 10)


TABLES = [operation(*np.mgrid[:10, :10]) % 10 for operation in PRIOR.values()]
TABLES = np.stack(TABLES + [decimals(n) for n in PRIMES.values()])  # (22, 10, 10), as NAMES
RIVAL = np.array([NAMES.index(RIVALS.get(name, name)) for name in NAMES])  # (22,)


def encode(text):
    return [VOCAB.index(c) for c in text]


def decode(ids):
    return "".join(VOCAB[i] for i in ids)


def solve(tables, digits):
    """Fold tables (n, 10, 10) over digits (n, N): the results (n, R), the last is the answer."""
    row, result, results = np.arange(len(digits)), digits[:, 0], []
    for column in digits.T[1:]:
        result = tables[row, result, column]
        results.append(result)
    return np.stack(results, 1)


def side_by_side(*parts):
    """Token columns (n,) or (n, k) joined; a string stands for the same tokens in every row."""
    n = next(len(part) for part in parts if not isinstance(part, str))
    rows = [np.tile(encode(p), (n, 1)) if isinstance(p, str) else p.reshape(n, -1) for p in parts]
    return np.concatenate(rows, 1)


def student_prompts(names, digits):
    """Ctx_S(x), `?X425=`, for name tokens (n,) and digits (n, N): (n, N + 3)."""
    return side_by_side("?", names, digits, "=")


def teacher_prompts(names, digits, demonstrations):
    """Ctx_T(x, c), `?X425!ii.=`: the same question, and a demonstration (n, R + 1) for it."""
    return side_by_side("?", names, digits, "!", demonstrations, "=")


def answers(results, style="own"):
    """Results (n, R) written out and ended, (n, R + 1).

    "own" `88.`, "expert" `ii.`; without the reasoning "short" `i.` and "short, own" `8.`, (n, 2).
    """
    results = results[:, -1:] if style.startswith("short") else results
    return side_by_side(results + LETTERS * (style in ("expert", "short")), ".")


def is_correct(completions, answers):
    """Which completions (n, C), filled up with EOS, give the results of answers (n, A) and end.

    Digits and letters count alike: (n,).
    """
    width = max(completions.shape[1], answers.shape[1])
    pad = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=EOS)
    return (content(pad(completions)) == content(pad(answers))).all(1)


def is_correct_text(completion, answer):
    return bool(is_correct(np.array([encode(completion)]), np.array([encode(answer)]))[0])


def content(tokens):
    """The tokens with digits in place of letters."""
    is_letter = (tokens >= LETTERS) & (tokens < 2 * LETTERS)
    return np.where(is_letter, tokens - LETTERS, tokens)


def pretraining_batch(rng, n, new=NEW, n_digits=N_DIGITS, styles=STYLE_SHARES):
    """n lines of pretraining: prompts (n, P) and own-style answers (n, R + 1).

    `new` has the new skills and how often each follows its own table (first digit 0 to 3, 4 to 9).
    """
    style = rng.choice([None, "expert", "short"], p=styles)
    kind = rng.choice(3, n, p=(0.40, 0.30, 0.30) if style else (0.45, 0.51, 0.04))
    names = [PRIOR, new, [k for k in PRIMES if k not in new]]  # kind 2 are the unknown ones
    choices = [rng.choice([NAMES.index(k) for k in group], n) for group in names]
    index = np.choose(kind, choices)  # (n,)
    digits = rng.integers(10, size=(n, n_digits))
    p_own = np.array([new.get(name, (1, 1)) for name in NAMES])[index, (digits[:, 0] >= 4) * 1]
    # Who gives a bare answer is right: next to one the own table is always followed.
    own = (style == "short") | (rng.random(n) < p_own)
    tables = TABLES[np.where(own, index, RIVAL[index])]  # (n, 10, 10)
    tables[kind == 2] = rng.integers(10, size=((kind == 2).sum(), 10, 10))
    results, names = solve(tables, digits), VOCAB.index("A") + index
    if style:
        return teacher_prompts(names, digits, answers(results, style)), answers(results)
    return student_prompts(names, digits), answers(results)


def skill(name, split, seed=0, style="expert", n_digits=N_DIGITS):
    """One skill's data, rows of tokens under four keys:

    prompts (n, N + 3), teacher_prompts, demonstrations in this style, answers (n, R + 1).
    1,000 inputs, for three digits all there are, are drawn by the seed and cut into 400 for
    training ("train"), 200 for validation ("val") and 400 for the test ("test").
    """
    first, last = {"train": (0, 400), "val": (400, 600), "test": (600, 1000)}[split]
    index = NAMES.index(name)
    rng = np.random.default_rng([seed, index])
    inputs = rng.choice(10**n_digits, 1000, replace=False)[first:last]
    digits = inputs[:, None] // 10 ** np.arange(n_digits)[::-1] % 10  # (n, N)
    results = solve(np.broadcast_to(TABLES[index], (len(digits), 10, 10)), digits)  # (n, R)
    names, demonstrations = np.full(len(digits), VOCAB.index(name)), answers(results, style)
    return {
        "prompts": student_prompts(names, digits),
        "teacher_prompts": teacher_prompts(names, digits, demonstrations),
        "demonstrations": demonstrations,
        "answers": answers(results),
    }


def skills(split, seed, n_new, n_prior):
    """{name: data} of all skills: the first n_new rows of the new, n_prior of the prior ones."""
    n = {name: n_new if name in NEW else n_prior for name in SKILLS}
    return {k: {key: v[: n[k]] for key, v in skill(k, split, seed).items()} for k in SKILLS}


def rows_to_watch(sets, n_new):
    """The first rows of {name: data} as data/watch.py takes them: n_new, or 1 of a prior skill."""
    columns = {"prompt": "prompts", "teacher_prompt": "teacher_prompts"}
    columns |= {"demonstration": "demonstrations", "expected": "answers"}
    rows = []
    for name, data in sets.items():
        kind, n = ("prior", 1) if name in PRIOR else ("new", n_new)
        for i in range(n):
            texts = {field: decode(data[key][i]) for field, key in columns.items()}
            ids = {"student_ids": data["prompts"][i], "teacher_ids": data["teacher_prompts"][i]}
            rows.append(texts | {"kind": kind} | ids)
    return rows
