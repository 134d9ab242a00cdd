"""samples.jsonl: what a model said during training, and what both roles think of every token of it.

One JSON object per line, the same from every trainer. A row is one response:

    step            updates done before it was sampled, since the skill began; 0: before training
    phase, skill    the arm that is trained, e.g. "sdft"; what it is learning then, null if only one
    kind            "new" for a prompt of what is being learned, "prior" for one never trained on
    role            who gives the response: the "student", or the "teacher" with its own prompt
    prompt          what the student reads, as text: Ctx_S(x)
    teacher_prompt  what the teacher reads, as text: Ctx_T(x, c)
    demonstration   the expert's demonstration c, as text; "" if there is none
    expected        the expected answer as text, null if unknown
    correct         whether the response is correct: true, false, or null if unknown
    response        the response as text
    divergence      name of the tokens' divergence: "reverse", "forward" or "jsd", as in sdft.py
    tokens          an object per token of the response, the end token included:
        id, text          the token; bytes that are no whole UTF-8 character stand as \\xNN
        student, teacher  its probability under each role
        divergence        of both roles' distributions of the next token, in nats
        reward            implicit reward log π_T - log π_S of the token, in nats, Eqs. (3)-(6)
        push              minus the divergence's derivative by the token's logit: a step on this
                          loss raises the token if it is positive. It is relative: a token that the
                          teacher likes less also rises if the teacher likes the others far less.
        student_top, teacher_top   each role's three likeliest tokens: [id, text, probability]

Numbers have five significant digits.
"""

import json

import numpy as np

ABOUT = dict.fromkeys("step phase skill kind role prompt teacher_prompt demonstration".split())
ABOUT |= {"role": "student", "expected": None, "correct": None}


def sample_row(tokens, student_log_probs, teacher_log_probs, decode, divergence, **about):
    """One row, of the C token ids of a response without its padding.

    log_probs  (C, V) each, of the next token before each of the tokens; logits do as well
    decode     function from a list of token ids to text, or to bytes in UTF-8
    about      the fields from step to correct; what is left out is null, role "student"
    """
    if not set(about) <= set(ABOUT):
        raise ValueError(f"unknown fields {sorted(set(about) - set(ABOUT))}; use {[*ABOUT]}")
    log_p, log_q = log_softmax(student_log_probs), log_softmax(teacher_log_probs)
    if log_p.shape != log_q.shape or log_p.shape[:-1] != (len(tokens),):
        raise ValueError(f"{log_p.shape} and {log_q.shape} must be (C, V), C = {len(tokens)}")
    p, q, log_m = np.exp(log_p), np.exp(log_q), np.logaddexp(log_p, log_q) - np.log(2)  # (C, V)
    # Each divergence, and p times its derivative by p, from which `push` follows by the softmax.
    terms, slope = {
        "reverse": (p * (log_p - log_q), p * (log_p - log_q)),
        "forward": (q * (log_q - log_p), -q),
        "jsd": ((p * (log_p - log_m) + q * (log_q - log_m)) / 2, p * (log_p - log_m) / 2),
    }[divergence]
    push = p * slope.sum(-1, keepdims=True) - slope  # (C, V)

    def text(ids):
        decoded = decode(ids)
        return decoded if isinstance(decoded, str) else decoded.decode("utf-8", "backslashreplace")

    def likeliest(probs):
        few = np.argpartition(-probs, min(3, len(probs) - 1))[:3]  # a vocabulary is large to sort
        few = few[np.argsort(-probs[few])]
        return [[int(i), text([int(i)]), short(probs[i])] for i in few]

    scored = []
    for t, i in enumerate(map(int, tokens)):
        token = {"id": i, "text": text([i]), "student": short(p[t, i]), "teacher": short(q[t, i])}
        token |= {"divergence": short(terms[t].sum()), "reward": short(log_q[t, i] - log_p[t, i])}
        token |= {"push": short(push[t, i]), "student_top": likeliest(p[t])}
        scored.append(token | {"teacher_top": likeliest(q[t])})
    response = text([int(i) for i in tokens])
    return ABOUT | about | {"response": response, "divergence": divergence, "tokens": scored}


def log_softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)  # (C, V)
    if not np.isfinite(logits).all():
        raise ValueError(
            "the log-probabilities of a sample must be finite, of the whole vocabulary"
        )
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def short(number):
    return float(f"{number:.5g}")


def append(path, rows):
    """Add JSON objects to a JSONL file."""
    # A lone surrogate, which UTF-8 has not, becomes the \\u escape that it is in JSON.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as f:
        f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path):
    """The JSON objects of a JSONL file, and how many lines hold none, e.g. a last line cut off."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
        lines = [line for line in f if line.strip()]
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            pass
    rows = [row for row in rows if isinstance(row, dict)]
    return rows, len(lines) - len(rows)
