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
    """Results (n, 2) written out and ended, (n, 3): `88.` in the model's own style, `ii.` in the expert's."""
    return _columns(results + LETTERS * (style == "expert"), ".")


def is_right(completions, answers):
    """Which completions (n, C), filled up with EOS, say what answers (n, 3) say and then end, in either style: (n,)."""
    width = max(completions.shape[1], answers.shape[1])
    c, a = (np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=EOS) for x in (completions, answers))
    c, a = (np.where((x >= LETTERS) & (x < 2 * LETTERS), x - LETTERS, x) for x in (c, a))
    return (c == a).all(1)


def pretraining_batch(rng, n, with_demonstration):
    """n lines of the base's pretraining: prompts (n, 6), or (n, 10) with a demonstration, and own-style answers (n, 3)."""
    share = (0.40, 0.30, 0.30) if with_demonstration else (0.55, 0.37, 0.08)  # prior, new, unknown
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
    if with_demonstration:
        return teacher_prompts(names, digits, answers(results, "expert")), answers(results)
    return student_prompts(names, digits), answers(results)


def skill(name, split, seed=0, style="expert"):
    """One skill's data: {"prompts" (n, 6), "teacher_prompts" (n, 10), "demonstrations" (n, 3), "answers" (n, 3)}.

    The 1,000 possible inputs are shuffled by the seed and cut into 400 for training, 200 for validation and 400 for
    the test; `style` is that of the demonstrations.
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
