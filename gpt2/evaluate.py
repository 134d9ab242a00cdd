"""What a model can do: scores, and tables of them."""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from data import watch
from data.scoring import contains, is_exact
from gpt2.fast import scored
from sdft import completion_logits, rollout, token_divergence

N_WATCHED = 24  # training rows
PATIENCE = 10  # seconds of an evaluation without a line
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
def evaluate(model, sets, tokenizer, max_new_tokens, batch_size, base=None):
    """Scores of a model on {name: rows}, the sets of `train.read_sets`, greedily.

    exact, lenient  share of "test" answered right, by each match of data/scoring.py
    length          tokens of those responses, with the end token
    kl_to_base      KL(model ‖ base) in nats per token of those responses
    ood, old FILE   share of that set answered right, leniently
    prior_ppl       perplexity of the "texts"
    prior_acc       share of the "questions" whose answer is the likeliest continuation, token by
                    token, with or without a space before it
    """
    scores, eos_id = {}, tokenizer.eos_id

    def responses(name):
        """Batches of prompts, completions (B, C) and mask (B, C); and all texts."""
        rows, done, texts, last = sets[name], [], [], time.monotonic()
        for i in range(0, len(rows), batch_size):
            if time.monotonic() - last > PATIENCE:
                print(f"evaluating {name}: {i} of {len(rows)} rows")
                last = time.monotonic()
            prompts = [row["prompt_ids"] for row in rows[i : i + batch_size]]
            done.append((prompts, *rollout(model, prompts, max_new_tokens, eos_id, temperature=0)))
            texts += map(tokenizer.decode, done[-1][1].tolist())
        return done, texts

    def share(right, name, texts):
        return np.mean([right(s, row["answer"]) for s, row in zip(texts, sets[name], strict=True)])

    if sets["test"]:
        done, texts = responses("test")
        scores["exact"] = share(is_exact, "test", texts)
        scores["lenient"] = share(contains, "test", texts)
        n_tokens = sum(mask.sum().item() for _, _, mask in done)
        scores["length"] = n_tokens / len(texts)
        kl = 0.0 if base is None else sum(kl_sum(model, base, *batch) for batch in done)
        scores["kl_to_base"] = kl / n_tokens
    for name in ["ood", *(name for name in sets if name.startswith("old "))]:
        if sets[name]:
            scores[name] = share(contains, name, responses(name)[1])
    if sets["texts"]:
        texts = [([eos_id], row["text_ids"]) for row in sets["texts"]]
        scores["prior_ppl"] = perplexity(model, texts, eos_id, batch_size)
    if sets["questions"]:
        pairs = [(r["prompt_ids"], ids) for r in sets["questions"] for ids in r["answer_ids"]]
        right = np.reshape(likeliest(model, pairs, eos_id, batch_size), (-1, 2))  # of both ways
        scores["prior_acc"] = right.any(1).mean()
    return {name: float(score) for name, score in scores.items()}


def kl_sum(model, base, prompts, completions, mask):
    """Σ KL(model ‖ base), in nats, over the tokens of the responses."""
    logits, base_logits = (completion_logits(m, prompts, completions) for m in (model, base))
    return (token_divergence(logits, base_logits, "reverse") * mask).sum().item()


def perplexity(model, texts, eos_id, batch_size):
    """exp of the mean nats per token; texts are (prompt, tokens)."""
    nll, count = 0.0, 0
    for logits, tokens, mask in scored(model, texts, eos_id, batch_size):
        log_p = logits.float().log_softmax(-1)  # (B, C, V)
        nll -= (log_p.gather(2, tokens[..., None])[..., 0] * mask).sum().item()
        count += mask.sum().item()
    return math.exp(nll / count)


def likeliest(model, questions, eos_id, batch_size):
    """For every (prompt, answer): is each token of the answer the likeliest one?"""
    right = []
    for logits, tokens, mask in scored(model, questions, eos_id, batch_size):
        right += ((logits.argmax(-1) == tokens) | ~mask).all(1).tolist()
    return right


def rows_to_watch(sets, longest):
    """The first training rows and prior questions of at most `longest` tokens for `watch.look`."""
    rows = [row | {"kind": "new"} for row in sets["train"][:N_WATCHED]]
    for row in sets["questions"]:
        if len(row["prompt_ids"]) <= longest:
            same = {"teacher_prompt": row["prompt"], "teacher_ids": row["prompt_ids"]}
            rows.append(row | same | {"kind": "prior", "demonstration": ""})
    rows = [row | {"student_ids": row["prompt_ids"], "expected": row["answer"]} for row in rows]
    names = ("kind", "prompt", "teacher_prompt", "demonstration", "expected")
    names += ("student_ids", "teacher_ids")
    return [{name: row[name] for name in names} for row in rows[: N_WATCHED + watch.N_SAMPLES]]


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
            label = f"{folder}: {config['method']}, {config['steps']} steps, lr {config['lr']:g}"
            table([(label, base), (label, final)])
        except Exception:  # whatever the contents of another file raise
            raise ValueError(f"{folder} is not the --out_dir of a finished run") from None
        if base not in [scores for _, scores in rows]:
            rows.append((f"base of {folder}", base))
        rows.append((label, final))
    return table(rows)
