"""A world of small arithmetic in which a model can know, half know, or not know a skill. numpy only, seeded.

A prompt names an operation and gives three digits: `?X425=`. The answer folds the operation's 10 x 10 table over the
digits from the left and writes every intermediate result, then the end token: `88.` where X(4, 2) = 8 and X(8, 5) = 8.

  A ... H  prior skills, known: the benchmark that fine-tuning must not damage
  X, Y, Z  new skills, half known: in pretraining their prompts follow the right table 60% of the time, otherwise a
           random one
  M ... W  unknown names: a fresh random table each time, so that without a demonstration there is nothing to know,
           and with one the answer has to be read from the context; they teach in-context learning

Two styles carry the same content. The model's own answers are digits, an expert's demonstrations are letters, a-j for
0-9. The teacher prompt `?X425!ii.=` shows a demonstration, and its answer is in the model's own style again: `88.`.
An answer-only demonstration, `i.`, leaves out the reasoning.

A second world holds facts: each of 100 entities, named by two letters, has two attributes, digits. `?Acj=` asks for the
attributes of cj and their sum, `?Bcj=` for the attributes and their difference: `471.` and `477.`.

Shapes: n rows of token ids; see data/README.md for an example of every kind of line.
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
# arbitrary tables that anyone can check: the first 100 decimals of √2, √3 and √5; nothing to derive, they have to be known
DECIMALS = {k: np.array([*str(math.isqrt(n * 10**200))[1:101]], int).reshape(10, 10) for k, n in {"X": 2, "Y": 3, "Z": 5}.items()}
NEW = {k: lambda a, b, table=table: table[a, b] for k, table in DECIMALS.items()}
KNOWN = {**PRIOR, **NEW}
UNKNOWN = "MNOPQRSTUVW"
RIGHT = 0.6  # how often a new skill's prompt follows its own table in pretraining

VOCAB = "0123456789" + "abcdefghij" + ".?!=" + "".join(KNOWN) + UNKNOWN  # digit d is token d, its expert letter token 10 + d
EOS = VOCAB.index(".")
LETTERS = 10  # add to a digit's token for the expert's letter
N_DIGITS = 3

_a, _b = np.mgrid[:10, :10]
TABLES = np.stack([f(_a, _b) % 10 for f in KNOWN.values()])  # (11, 10, 10), in the order of KNOWN


def encode(text):
    return [VOCAB.index(c) for c in text]


def decode(ids):
    return "".join(VOCAB[i] for i in ids)


def solve(tables, digits):
    """Fold tables (n, 10, 10) over digits (n, 3): the intermediate results (n, 2), the answer last."""
    row, result, steps = np.arange(len(digits)), digits[:, 0], []
    for d in digits.T[1:]:
        result = tables[row, result, d]
        steps.append(result)
    return np.stack(steps, 1)


def _columns(*parts):
    """Join token columns side by side; a string stands for the same tokens in every row."""
    n = next(len(p) for p in parts if not isinstance(p, str))
    return np.concatenate([np.tile(encode(p), (n, 1)) if isinstance(p, str) else p.reshape(n, -1) for p in parts], 1)


def student_prompts(names, digits):
    """`?X425=` for name tokens (n,) and digits (n, 3): (n, 6)."""
    return _columns("?", names, digits, "=")


def teacher_prompts(names, digits, demonstrations):
    """`?X425!ii.=`: the same question with a demonstration (n, 3) for it: (n, 10)."""
    return _columns("?", names, digits, "!", demonstrations, "=")


def answers(results, style="own"):
    """Results (n, R) written out and ended, (n, R + 1): `88.` in the model's own style, `ii.` in the expert's; "short" is
    the expert's without the reasoning, (n, 2): `i.`."""
    results = results[:, -1:] if style == "short" else results
    return _columns(results + LETTERS * (style != "own"), ".")


def is_right(completions, answers):
    """Which completions (n, C), filled up with EOS, say what answers (n, A) say and then end, in either style: (n,)."""
    width = max(completions.shape[1], answers.shape[1])
    c, a = (np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=EOS) for x in (completions, answers))
    return (_content(c) == _content(a)).all(1)


def is_right_at_last(completions, answers):
    """Which completions end and give the right result just before, whatever they say on the way there: (n,)."""
    last = lambda x: np.take_along_axis(x, (x != EOS).sum(1, keepdims=True) - 1, 1)[:, 0]
    return (_content(last(completions)) == last(answers)) & (completions[:, -1] == EOS)


def _content(tokens):
    return np.where((tokens >= LETTERS) & (tokens < 2 * LETTERS), tokens - LETTERS, tokens)


# --- Skills ---------------------------------------------------------------------------------------------------------


def skills_batch(rng, n, seed=0):
    """n lines of the base's pretraining: prompts (n, P), with or without a demonstration, and own-style answers (n, 3)."""
    style = rng.choice([None, "expert", "short"], p=[0.80, 0.14, 0.06])
    share = (0.40, 0.30, 0.30) if style else (0.55, 0.37, 0.08)  # prior, new, unknown
    kind = rng.choice(3, n, p=share)
    prior = rng.integers(len(PRIOR), size=n)
    new = len(PRIOR) + rng.integers(len(NEW), size=n)
    unknown = len(KNOWN) + rng.integers(len(UNKNOWN), size=n)
    names = VOCAB.index("A") + np.choose(kind, [prior, new, unknown])
    tables = TABLES[np.where(kind == 1, new, prior)]
    guess = (kind == 2) | (kind == 1) & (rng.random(n) >= RIGHT)
    tables[guess] = rng.integers(10, size=(guess.sum(), 10, 10))
    digits = rng.integers(10, size=(n, N_DIGITS))
    results = solve(tables, digits)
    if style:
        return teacher_prompts(names, digits, answers(results, style)), answers(results)
    return student_prompts(names, digits), answers(results)


def skill(name, split, seed=0, style="expert"):
    """One skill's data: {"prompts" (n, 6), "teacher_prompts" (n, 10), "demonstrations" (n, 3), "answers" (n, 3)}.

    The 1,000 possible inputs are shuffled by the seed and cut into 400 for training, 200 for validation and 400 for
    the test; `style` is that of the demonstrations, see `answers`.
    """
    first, last = {"train": (0, 400), "val": (400, 600), "test": (600, 1000)}[split]
    index = list(KNOWN).index(name)
    inputs = np.random.default_rng([seed, index]).permutation(10**N_DIGITS)[first:last]
    digits = inputs[:, None] // 10 ** np.arange(N_DIGITS)[::-1] % 10  # (n, 3)
    results = solve(np.broadcast_to(TABLES[index], (len(digits), 10, 10)), digits)
    names, demonstrations = np.full(len(digits), VOCAB.index(name)), answers(results, style)
    return {
        "prompts": student_prompts(names, digits),
        "teacher_prompts": teacher_prompts(names, digits, demonstrations),
        "demonstrations": demonstrations,
        "answers": answers(results),
    }


# --- Facts ----------------------------------------------------------------------------------------------------------

FACTS = {"known": (0, 60), "new": (60, 80), "val": (80, 100)}  # of the 100 entities, in the seed's order; val: to choose settings on


def _facts(seed):
    """Every entity's attributes (100, 2), and the entities in the seed's order (100,)."""
    rng = np.random.default_rng([seed, 3])
    return rng.integers(10, size=(100, 2)), rng.permutation(100)


def _questions(question, entities, attributes):
    """For "A" or "B" (n,), entities (n,) and their attributes (n, 2): the prompts (n, 5) and the results (n, 3)."""
    operation = TABLES[question - VOCAB.index("A"), attributes[:, 0], attributes[:, 1]]
    name = LETTERS + np.stack([entities // 10, entities % 10], 1)
    return _columns("?", question, name, "="), np.column_stack([attributes, operation])


def _with_text(prompts, results, reads):
    """The question with a text: `?Acj!eh.=` with an article, `?Acj!b.=` with an answer, `?Acj!ehb.=` with both."""
    text = {"article": results[:, :-1], "answer": results[:, -1:], "both": results}[reads]
    return _columns(prompts[:, :-1], "!", answers(text, "expert"), "=")


def facts_batch(rng, n, seed):
    """n lines of the pretraining on facts: prompts (n, P) and own-style answers (n, 4). What is known is always told right,
    the rest at random, so that without a text there is nothing to know and with one it has to be read."""
    reads = rng.choice([None, "both", "article", "answer"], p=[0.4, 0.15, 0.35, 0.1])
    attributes, order = _facts(seed)
    place = np.where(rng.random(n) < (0.25 if reads else 0.7), rng.integers(60, size=n), rng.integers(60, 100, size=n))
    entities = order[place]
    told = np.where((place < 60)[:, None], attributes[entities], rng.integers(10, size=(n, 2)))
    prompts, results = _questions(VOCAB.index("A") + rng.integers(2, size=n), entities, told)
    return (_with_text(prompts, results, reads) if reads else prompts), answers(results)


def facts(part, seed=0, question="A", reads="both"):
    """The questions about one part of FACTS, in the form of `skill`. `reads` is what the teacher reads: the "article", which gives the
    attributes, the "answer", which is the result, or "both"; the demonstrations are always the full answers."""
    attributes, order = _facts(seed)
    entities = order[slice(*FACTS[part])]
    prompts, results = _questions(np.full(len(entities), VOCAB.index(question)), entities, attributes[entities])
    return {
        "prompts": prompts,
        "teacher_prompts": _with_text(prompts, results, reads),
        "demonstrations": answers(results, "expert"),
        "answers": answers(results),
    }
