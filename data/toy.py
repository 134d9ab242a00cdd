"""Worlds of small arithmetic: a skill is known, taken for another one, or cannot be known.

numpy only; every line is made anew from a seed. A token is a character. data/README.md has an
example of every kind of line.

A prompt names an operation and gives N digits: `?X425=`. The answer folds the operation's 10 x 10
table over the digits from the left and writes every intermediate result, then the end token:
`88.`, since X(4, 2) = 8 and X(8, 5) = 8.

  A ... H  prior skills, known: the benchmark that fine-tuning must not damage.
  X, Y, Z  new skills. In pretraining a prompt's whole answer follows either the skill's own
           table, the correct one, or the table of one prior skill, its rival. The own table is
           likelier if the first digit is 0 to 3, the rival if it is 4 to 9, so that the base's
           greedy answer is correct on about four inputs of ten.
  M ... W  unknown names: a fresh random table each time. Only a demonstration can tell, so they
           teach in-context learning. In the larger world of the experiments only W is one, M to Q
           are new skills as well, and R to V follow their own tables with shares from 0 to .6.

Two styles carry the same content. The model's own answers are digits, an expert's demonstrations
are letters, a-j for 0-9. The teacher's prompt `?X425!ii.=` holds a demonstration, and its answer is
in the model's own style again: `88.`. An answer-only demonstration, `i.`, omits the reasoning.

Another world holds facts: each of 100 entities, named by two letters, has two digits as
attributes. `?cjA=` asks for the attributes of cj and their sum, `?cjB=` for the attributes and
their difference: `471.` and `477.`.

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
# Of every other name, a number whose square root's decimals are its table, and the prior skill
# that it is taken for.
PRIMES = dict(zip("XYZMNOPQRSTUVW", (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)))
RIVALS = dict(zip("XYZMNOPQRSTUVW", "ACFBDEGHACFBDE"))
NAMES = [*PRIOR, *PRIMES]
P_OWN = (0.8, 0.25)  # how often a new skill follows its own table: first digit 0 to 3, 4 to 9
NEW = dict.fromkeys("XYZ", P_OWN)
KNOWN = [*PRIOR, *NEW]
# The larger world's new skills: as often as in the small one, and of five others how often.
HALF = "XYZMNOPQ"
COLD = {"R": 0.0, "S": 0.03, "T": 0.1, "U": 0.3, "V": 0.6}
STYLES = (0.80, 0.14, 0.06)  # batches without a demonstration, with a full one, with a bare answer

VOCAB = "0123456789" + "abcdefghij" + ".?!=" + "".join(NAMES)
EOS = VOCAB.index(".")
LETTERS = 10  # digit d is token d, the expert's letter for it is token LETTERS + d
N_DIGITS = 3


def decimals(n):
    """The first 100 decimals of the square root of n, 1 < n < 100, as a table (10, 10).

    Arbitrary tables that anyone can check: there is nothing to derive, they must be known.
    """
    return np.array([*str(math.isqrt(n * 10**200))[1:101]], int).reshape(10, 10)


_a, _b = np.mgrid[:10, :10]
TABLES = np.stack(  # (22, 10, 10), in the order of NAMES
    [operation(_a, _b) % 10 for operation in PRIOR.values()]
    + [decimals(n) for n in PRIMES.values()]
)
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


def _columns(*parts):
    """Join token columns side by side; a string stands for the same tokens in every row."""
    n = next(len(part) for part in parts if not isinstance(part, str))
    columns = []
    for part in parts:
        text = isinstance(part, str)
        columns.append(np.tile(encode(part), (n, 1)) if text else part.reshape(n, -1))
    return np.concatenate(columns, 1)


def student_context(names, digits):
    """Ctx_S: `?X425=` for name tokens (n,) and digits (n, N), (n, N + 3)."""
    return _columns("?", names, digits, "=")


def teacher_context(names, digits, demonstrations):
    """Ctx_T: `?X425!ii.=`, the same question with a demonstration (n, R + 1) for it."""
    return _columns("?", names, digits, "!", demonstrations, "=")


def answers(results, style="own"):
    """Results (n, R) written out and ended, (n, R + 1).

    "own" `88.`, "expert" `ii.`, or "short", the expert's without the reasoning, (n, 2): `i.`.
    """
    results = results[:, -1:] if style == "short" else results
    return _columns(results + LETTERS * (style != "own"), ".")


def is_correct(completions, answers):
    """Which completions (n, C), filled up with EOS, give the results of answers (n, A) and end.

    Digits and letters count alike: (n,).
    """
    width = max(completions.shape[1], answers.shape[1])
    pad = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=EOS)
    return (content(pad(completions)) == content(pad(answers))).all(1)


def is_last_correct(completions, answers):
    """Which completions end, and have the correct result just before the end: (n,)."""
    last = lambda x: np.take_along_axis(x, (x != EOS).sum(1, keepdims=True) - 1, 1)[:, 0]
    return (content(last(completions)) == last(answers)) & (completions[:, -1] == EOS)


def content(tokens):
    """The tokens with digits in place of letters."""
    is_letter = (tokens >= LETTERS) & (tokens < 2 * LETTERS)
    return np.where(is_letter, tokens - LETTERS, tokens)


def cold_skills(seed):
    """{name: share of own answers}: the levels change places with the seed."""
    levels = [*COLD.values()]
    return {name: levels[(i + seed) % len(levels)] for i, name in enumerate(COLD)}


def many_skills(seed):
    """The new skills of the larger world, as `rivals_batch` takes them."""
    return dict.fromkeys(HALF, P_OWN) | {name: (p, p) for name, p in cold_skills(seed).items()}


def rivals_batch(rng, n, seed=0, new=NEW, n_digits=N_DIGITS, styles=STYLES):
    """n lines of pretraining: prompts (n, P) and own-style answers (n, R + 1).

    `new` has the new skills and how often each follows its own table, `styles` the shares of
    batches by the demonstrations in their prompts. Whoever gives a bare answer is right, so that
    with one the own table is followed always.
    """
    style = rng.choice([None, "expert", "short"], p=styles)
    kind = rng.choice(3, n, p=(0.40, 0.30, 0.30) if style else (0.45, 0.51, 0.04))
    names = [PRIOR, new, [k for k in PRIMES if k not in new]]  # kind 2 are the unknown ones
    choices = [rng.choice([NAMES.index(k) for k in group], n) for group in names]
    index = np.choose(kind, choices)  # (n,)
    digits = rng.integers(10, size=(n, n_digits))
    p_own = np.array([new.get(name, (1, 1)) for name in NAMES])[index, (digits[:, 0] >= 4) * 1]
    own = (style == "short") | (rng.random(n) < p_own)
    tables = TABLES[np.where(own, index, RIVAL[index])]  # (n, 10, 10)
    tables[kind == 2] = rng.integers(10, size=((kind == 2).sum(), 10, 10))
    results, names = solve(tables, digits), VOCAB.index("A") + index
    if style:
        return teacher_context(names, digits, answers(results, style)), answers(results)
    return student_context(names, digits), answers(results)


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
        "prompts": student_context(names, digits),
        "teacher_prompts": teacher_context(names, digits, demonstrations),
        "demonstrations": demonstrations,
        "answers": answers(results),
    }


def prompts_to_watch(sets, n_new):
    """The first rows of {name: data} as data/watch.py takes them: n_new of a new skill, else 1."""
    keys = ("prompts", "teacher_prompts", "demonstrations", "answers")
    names = ("prompt", "teacher_prompt", "demonstration", "expected")
    rows = []
    for name, data in sets.items():
        kind, n = ("new", n_new) if name in NEW else ("prior", 1)
        for ids in zip(*(data[key][:n] for key in keys)):
            rows.append(dict(zip(names, map(decode, ids)), kind=kind, answer=ids[3]))
            rows[-1] |= {"student_ids": ids[0], "teacher_ids": ids[1]}
    return rows


# --- Facts ---------------------------------------------------------------------------------------

FACTS = {"known": (0, 60), "new": (60, 80), "val": (80, 100)}  # of the entities in the seed's order


def _facts(seed):
    """Every entity's attributes (100, 2), and the entities in the seed's order (100,)."""
    rng = np.random.default_rng([seed, 3])
    return rng.integers(10, size=(100, 2)), rng.permutation(100)


def _questions(question, entities, attributes):
    """Prompts (n, 5) and results (n, 3) for "A" or "B" (n,), entities (n,), attributes (n, 2)."""
    operation = TABLES[question - VOCAB.index("A"), attributes[:, 0], attributes[:, 1]]
    name = LETTERS + np.stack([entities // 10, entities % 10], 1)
    return _columns("?", name, question, "="), np.column_stack([attributes, operation])


def _with_text(prompts, results, reads):
    """The question with a text: `?cjA!eh.=` an article, `?cjA!b.=` an answer, `?cjA!ehb.=` both."""
    text = {"article": results[:, :-1], "answer": results[:, -1:], "both": results}[reads]
    return _columns(prompts[:, :-1], "!", answers(text, "expert"), "=")


def facts_batch(rng, n, seed):
    """n lines of the pretraining on facts: prompts (n, P) and own-style answers (n, 4).

    Known facts are always told as they are, the others at random, so that without a text there is
    nothing to know about them, and with one it has to be read.
    """
    reads = rng.choice([None, "both", "article", "answer"], p=[0.4, 0.15, 0.35, 0.1])
    attributes, order = _facts(seed)
    known = rng.random(n) < (0.25 if reads else 0.7)
    place = np.where(known, rng.integers(60, size=n), rng.integers(60, 100, size=n))
    entities = order[place]
    told = np.where((place < 60)[:, None], attributes[entities], rng.integers(10, size=(n, 2)))
    prompts, results = _questions(VOCAB.index("A") + rng.integers(2, size=n), entities, told)
    return (_with_text(prompts, results, reads) if reads else prompts), answers(results)


def facts(part, seed=0, question="A", reads="both"):
    """The questions on one part of FACTS, in the form of `skill`.

    `reads` is what the teacher reads: the "article" (the attributes), the "answer" (the result) or
    "both". The demonstrations are always full answers.
    """
    attributes, order = _facts(seed)
    entities = order[slice(*FACTS[part])]
    asked = np.full(len(entities), VOCAB.index(question))
    prompts, results = _questions(asked, entities, attributes[entities])
    return {
        "prompts": prompts,
        "teacher_prompts": _with_text(prompts, results, reads),
        "demonstrations": answers(results, "expert"),
        "answers": answers(results),
    }
