"""What a model can do: scores, and tables of them."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from data import watch
from data.scoring import contains, is_exact
from gpt2.data import batches, decode, pad_right
from sdft import completion_logits, rollout, token_divergence

N_WATCHED = 24  # training rows
COLUMNS = {  # of the tables: score -> heading and format
    "exact": ("new exact", "{:.2f}"),
    "lenient": ("lenient", "{:.2f}"),
    "ood": ("OOD", "{:.2f}"),
    "prior_ppl": ("prior ppl", "{:.2f}"),
    "prior_acc": ("prior acc", "{:.2f}"),
    "kl_to_base": ("KL to base, nats/token", "{:.3f}"),
    "length": ("length", "{:.1f}"),
}


@torch.no_grad()
def evaluate(model, sets, enc, max_new_tokens, batch_size, base=None, start=False):
    """Scores of a model on sets {"train", "test", "ood", "prior", "old FILE" ...: rows}, greedily.

    exact, lenient  share of "test" answered right, by each match of data/scoring.py
    length          tokens of those responses, with the end token
    kl_to_base      KL(model ‖ base) in nats per token of those responses
    ood, old FILE   share of that set answered right, leniently
    prior_ppl       perplexity of the texts of "prior"
    prior_acc       share of the questions of "prior" whose answer is the likeliest continuation,
                    token by token
    as_teacher      at the start, or if base is None, so that the model is the base: share of
                    "train" answered right, leniently, with the teacher's prompt
    """
    scores, limits = {}, (enc, max_new_tokens, batch_size)
    if sets["test"]:
        rows, tested = sets["test"], responses(model, sets["test"], "prompt_ids", *limits)
        texts = [text for batch in tested for text in batch["texts"]]
        lengths = [n for batch in tested for n in batch["mask"].sum(1).tolist()]
        scores["exact"] = np.mean([is_exact(s, r["answer"]) for s, r in zip(texts, rows)])
        scores["lenient"] = np.mean([contains(s, r["answer"]) for s, r in zip(texts, rows)])
        scores["length"] = np.mean(lengths)
        kl = 0.0 if base is None else sum(kl_sum(model, base, batch) for batch in tested)
        scores["kl_to_base"] = kl / sum(lengths)

    def lenient(rows, key):
        texts = [text for batch in responses(model, rows, key, *limits) for text in batch["texts"]]
        return np.mean([contains(s, r["answer"]) for s, r in zip(texts, rows)])

    for name in ["ood", *(name for name in sets if name.startswith("old "))]:
        if sets[name]:
            scores[name] = lenient(sets[name], "prompt_ids")
    answered = [row for row in sets["train"] if row["answer"]]
    if (start or base is None) and answered:
        scores["as_teacher"] = lenient(answered, "teacher_ids")
    texts = [([enc.eot_token], row["text_ids"]) for row in sets["prior"] if "text_ids" in row]
    if texts:
        scores["prior_ppl"] = perplexity(model, texts, enc.eot_token, batch_size)
    questions = [(r["prompt_ids"], r["answer_ids"]) for r in sets["prior"] if "answer_ids" in r]
    if questions:
        scores["prior_acc"] = np.mean(likeliest(model, questions, enc.eot_token, batch_size))
    return {name: float(score) for name, score in scores.items()}


def responses(model, rows, key, enc, max_new_tokens, batch_size):
    """A list of batches: prompts, completions (B, C), mask (B, C), texts."""
    out = []
    for start in range(0, len(rows), batch_size):
        prompts = [row[key] for row in rows[start : start + batch_size]]
        completions, mask = rollout(model, prompts, max_new_tokens, enc.eot_token, temperature=0)
        texts = [decode(enc, tokens) for tokens in completions.tolist()]
        out.append(dict(prompts=prompts, completions=completions, mask=mask, texts=texts))
    return out


def kl_sum(model, base, batch):
    """Σ KL(model ‖ base), in nats, over the tokens of a batch of `responses`."""
    logits = completion_logits(model, batch["prompts"], batch["completions"])  # (B, C, V)
    base_logits = completion_logits(base, batch["prompts"], batch["completions"])  # (B, C, V)
    return (token_divergence(logits, base_logits, "reverse") * batch["mask"]).sum().item()


def perplexity(model, texts, eos_id, batch_size):
    """exp of the mean nats per token, at most e^700; texts are (prompt, tokens)."""
    nll, count = 0.0, 0
    for prompts, completions in batches(texts, batch_size, model.config.block_size):
        tokens, mask = pad_right(completions, eos_id, next(model.parameters()).device)
        log_p = completion_logits(model, prompts, tokens).float().log_softmax(-1)  # (B, C, V)
        nll -= (log_p.gather(2, tokens[..., None])[..., 0] * mask).sum().item()
        count += mask.sum().item()
    return math.exp(min(nll / count, 700))


def likeliest(model, questions, eos_id, batch_size):
    """For every (prompt, answer): is each token of the answer the likeliest one?"""
    right = []
    for prompts, answers in batches(questions, batch_size, model.config.block_size):
        tokens, mask = pad_right(answers, eos_id, next(model.parameters()).device)
        guesses = completion_logits(model, prompts, tokens).argmax(-1)  # (B, C)
        right += ((guesses == tokens) | ~mask).all(1).tolist()
    return right


# --- What data/watch.py looks at ------------------------------------------------------------------


def rows_to_watch(sets, longest):
    """The first training rows and prior questions of at most `longest` tokens for `watch.look`."""
    rows = [row | {"kind": "new"} for row in sets["train"][:N_WATCHED]]
    for row in sets["prior"]:
        if "answer_ids" in row and len(row["prompt_ids"]) <= longest:
            same = {"teacher_prompt": row["prompt"], "teacher_ids": row["prompt_ids"]}
            rows.append(row | same | {"kind": "prior", "demonstration": ""})
    rows = [row | {"student_ids": row["prompt_ids"], "expected": row["answer"]} for row in rows]
    names = ("kind", "prompt", "teacher_prompt", "demonstration", "expected")
    names += ("student_ids", "teacher_ids")
    return [{name: row[name] for name in names} for row in rows[: N_WATCHED + watch.N_SAMPLES]]


# --- Tables ---------------------------------------------------------------------------------------


def line_of(scores):
    """Scores or metrics on one line of the log."""
    return "  ".join(f"{name} {x:.4g}" for name, x in scores.items() if x is not None)


def table(rows):
    """Markdown of (label, scores) rows, a column for each file of --old; a dash is no score."""
    old = [name for _, scores in rows for name in scores if name.startswith("old ")]
    columns = COLUMNS | {name: (name, "{:.2f}") for name in old}
    lines = ["| | " + " | ".join(heading for heading, _ in columns.values()) + " |"]
    lines.append("|---" + "|---:" * len(columns) + "|")
    for label, scores in rows:
        text = {name: columns[name][1].format(scores[name]) for name in columns if name in scores}
        lines.append(f"| {label} | " + " | ".join(text.get(name, "-") for name in columns) + " |")
    return "\n".join(lines)


def report(folders):
    """The table of finished runs. Runs from one base share its row."""
    rows = []
    for folder in folders:
        try:
            results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
            config, base, final = (results[name] for name in ("config", "base", "final"))
        except (OSError, ValueError, LookupError, TypeError):
            raise ValueError(f"{folder} is not the --out_dir of a finished run") from None
        label = f"{folder}: {config['method']}, {config['steps']} steps, lr {config['lr']:g}"
        if base not in [scores for _, scores in rows]:
            rows.append((f"base of {folder}", base))
        rows.append((label, final))
    return table(rows)
