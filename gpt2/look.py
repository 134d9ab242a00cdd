"""What every evaluation looks at besides the scores: data/watch.py on a few rows of the data."""

import torch

from data import samples, watch
from data.scoring import contains
from gpt2 import checkpoint, fast
from gpt2.data import decode
from sdft import completion_logits

N_NEW, N_ROWS = 24, 8  # of the training rows; rows at a time, whose logits are all in memory

SCORES = {"new": "lenient", "prior": "prior_acc"}  # metric of data/watch.py: score of evaluate.py


@torch.no_grad()
def look(models, sets, enc, args, step):
    """`watch.look` at student, teacher (None for SFT) and base: metrics and samples.

    The student samples as in training, with the same random numbers at every look.
    """
    device = next(models[0].parameters()).device
    models = [model and fast.RolloutGPT.of(model) for model in models]

    def respond(model, prompts, greedy):
        generators = fast.row_generators(args.seed, 0, range(len(prompts)), device)
        temperature = 0 if greedy else args.temperature
        limits = args.max_new_tokens, enc.eot_token, temperature, generators
        return fast.rollout(model, prompts, *limits)

    score = lambda *context: completion_logits(*context).float().cpu().numpy()
    is_correct = lambda ids, row: contains(decode(enc, ids), row["expected"])
    rows = rows_to_watch(sets, enc, models[0].config.block_size - args.max_new_tokens)
    text = lambda ids: to_bytes(enc, ids)
    tools = respond, score, is_correct, text, enc.eot_token, args.divergence
    return watch.look(models, rows, *tools, n=N_ROWS, phase=args.method, skill=None, step=step)


def to_bytes(enc, ids):
    """Of one token, or of a response without its end token; ids beyond the encoding are 0xFF."""
    ids = ids[:-1] if len(ids) > 1 and ids[-1] == enc.eot_token else ids
    return b"".join(enc.decode_single_token_bytes(i) if i < enc.n_vocab else b"\xff" for i in ids)


def rows_to_watch(sets, enc, longest):
    """Training rows, and prior questions with room for a response, as data/watch.py takes them."""
    rows = []
    for row in sets["train"][:N_NEW]:
        demonstration = decode(enc, row.get("demonstration_ids", []))
        rows.append({"kind": "new", "demonstration": demonstration, "expected": row["answer"]})
        rows[-1] |= {"student_ids": row["prompt_ids"], "teacher_ids": row["teacher_ids"]}
    for row in sets["prior"]:
        if "answer_ids" in row and len(row["prompt_ids"]) <= longest:
            ids, expected = row["prompt_ids"], decode(enc, row["answer_ids"])
            rows.append({"kind": "prior", "demonstration": "", "expected": expected})
            rows[-1] |= {"student_ids": ids, "teacher_ids": ids}
    rows = rows[: N_NEW + watch.N_SAMPLES]
    for row in rows:
        row |= {"prompt": decode(enc, row["student_ids"])}
        row |= {"teacher_prompt": decode(enc, row["teacher_ids"])}
    return rows


def record(out, row, said):
    """Write samples and metrics of a look; the earlier looks, and the new warnings."""
    path = out / "metrics.jsonl"
    looks = [r for r in samples.read(path)[0] if "eval" in r] if path.exists() else []
    row |= {"warnings": watch.warnings([*looks, row])}
    for sample in said:
        checkpoint.append_line(out / "samples.jsonl", sample)
    checkpoint.append_line(path, row)
    return looks, row["warnings"]


def is_best(row, looks):
    """Does the new task's score exceed that of every earlier look at a trained model?"""
    return row["new"] > max((r["new"] for r in looks if r["step"]), default=-1)
