"""Fine-tune GPT-2 on your own demonstrations, by self-distillation (SDFT) or, to compare, by supervised fine-tuning (SFT).

    python train_gpt2.py --init_from gpt2 --data data/facts.jsonl --eval data/prior.jsonl --out_dir out/facts
    python train_gpt2.py --method sft --init_from gpt2 --data data/facts.jsonl --eval data/prior.jsonl --out_dir out/sft
    python train_gpt2.py --report out/facts out/sft                              # finished runs side by side
    python train_gpt2.py --init_from out/facts --data data/units.jsonl --out_dir out/units    # the next skill
    python train_gpt2.py --resume --out_dir out/facts                            # go on after an interruption
    torchrun --nproc_per_node=2 train_gpt2.py --init_from gpt2 ...               # several devices, the same update
    python train_gpt2.py --bench                                                 # how fast this machine is, and what bounds it

--data has one JSON object a line: prompt, demonstration, optional context (an article for the teacher), optional answer.
A response follows its prompt as it stands, so a prompt ends with the line break or the space that you want between them.

Writes to --out_dir: config.json and weights in Hugging Face's format, results.json, metrics.jsonl (a line per log line and
per evaluation), samples.jsonl (responses with the KL of every token and the teacher's alternatives) and checkpoints/.

Every random number follows from --seed, the step and the row's place in the minibatch. So a resumed run repeats the
uninterrupted one, and a minibatch may be cut up over micro-batches or processes without changing what the student says.
"""

import argparse
import copy
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import torch
import torch.distributed as dist

import bench
from cuda_graphs import GraphedGPT
from model import GPT, OPENAI, GPTConfig, make_folder, write_atomically
from sdft import completion_logits, rollout, sdft_loss, sft_loss, student_context, teacher_context, train_step, update

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # how GPT-2 splits text into words
CHUNK = 128  # completion tokens whose logits exist at a time
COLUMNS = {  # of the tables: key in results.json -> heading and format
    "exact": ("new exact", "{:.2f}"),
    "lenient": ("lenient", "{:.2f}"),
    "ood": ("OOD", "{:.2f}"),
    "prior_ppl": ("prior ppl", "{:.2f}"),
    "prior_acc": ("prior acc", "{:.2f}"),
    "kl_to_base": ("KL to base", "{:.3f}"),
    "length": ("length", "{:.1f}"),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = p.add_argument
    add("--init_from", default="gpt2", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or weights file in Hugging Face's GPT-2 format, a finished run's --out_dir included (default: %(default)s)")
    add("--data", help="JSONL to learn from: prompt, demonstration (or privileged_context), optional context and answer")
    add("--test", help="JSONL of prompt and answer that scores the new task (default: the rows of --data that have an answer)")
    add("--ood", help="JSONL of prompt and answer that asks for the same knowledge in another way")
    add("--eval", help="JSONL of prior abilities, never trained on: lines with text for perplexity, with prompt and answer for accuracy")
    add("--out_dir", help="folder for everything that is written")
    add("--method", choices=["sdft", "sft"], default="sdft", help="self-distillation, or cross entropy on the demonstrations (default: %(default)s)")
    add("--kl", choices=["reverse", "forward", "jsd"], default="reverse", help="divergence of the SDFT loss: reverse is the paper's Eq. (1), forward is what its experiments ran (default: %(default)s)")
    add("--teacher", choices=["ema", "frozen", "live"], default="ema", help="the teacher's weights: a moving average of the student, the start, or the student itself (default: %(default)s)")
    add("--ema_alpha", type=float, default=0.02, help="share of the student in the EMA teacher at every update (default: %(default)s)")
    add("--skip_tokens", type=int, default=0, help="tokens at the start of a response without loss; the released code has 3 (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="of the student's rollouts in training (default: %(default)s)")
    add("--max_new_tokens", type=int, default=64, help="length at which a response is cut off (default: %(default)s)")
    add("--steps", type=int, default=100, help="updates (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="rows per update, over all processes (default: %(default)s)")
    add("--micro_batch", type=int, default=None, help="rows scored at a time in each process; fewer save memory and change nothing else (default: all)")
    add("--lr", type=float, default=1e-5, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=int, default=10, help="updates of linear warm-up, before a cosine to zero (default: %(default)s)")
    add("--weight_decay", type=float, default=0.0, help="of AdamW (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order of rows and the sampling (default: %(default)s)")
    add("--device", default=None, help="cpu, cuda or mps (default: the best one there is)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the arithmetic; weights, optimiser and EMA stay float32; auto is bfloat16 on GPUs that have it (default: %(default)s)")
    add("--rollout_dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the weights that sample the responses; bfloat16 is a copy that reads half the memory; auto is --dtype's (default: %(default)s)")
    add("--cuda_graphs", action="store_true", help="record the decoding step as a CUDA graph and replay it; not yet run on a GPU")
    add("--compile", action="store_true", help="compile the scoring passes with torch.compile")
    add("--skip_long", action="store_true", help="drop rows that do not fit the model's block_size, and say how many, instead of stopping")
    add("--log_every", type=int, default=10, help="updates between log lines (default: %(default)s)")
    add("--eval_every", type=int, default=50, help="updates between evaluations (default: %(default)s)")
    add("--sample_every", type=int, default=50, help="updates between samples (default: %(default)s)")
    add("--save_every", type=int, default=50, help="updates between checkpoints, of which the newest two are kept (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out_dir with the settings of its run; start where there is none")
    add("--report", nargs="+", metavar="RUN", help="print a table of these finished runs and stop")
    add("--bench", action="store_true", help="time every phase of an update at the size of --init_from, with random weights, and stop; heeds --batch_size, --max_new_tokens, --device and the dtypes")
    args = p.parse_args(argv)
    whole = ("max_new_tokens", "steps", "batch_size", "micro_batch", "log_every", "eval_every", "sample_every", "save_every")
    limits = dict.fromkeys(whole, (1, 2**31)) | {"skip_tokens": (0, 2**31), "warmup": (0, 2**31), "seed": (0, 2**63 - 1)}
    limits |= {"batch_size": (1, 2**16), "lr": (0, 1), "weight_decay": (0, 1), "clip": (1e-6, 1e6), "ema_alpha": (0, 1)}
    for name, (low, high) in limits.items():
        if not low <= (low if getattr(args, name) is None else getattr(args, name)) <= high:  # NaN fails too
            p.error(f"--{name} must lie between {low} and {high}")
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        p.error("--temperature must be 0 (greedy) or lie between 0.01 and 100")
    if not args.report and not args.bench and not args.out_dir:
        p.error("--out_dir is missing: name a folder for what the run writes")
    return args


def given_flags(argv=None):
    """The names of the flags on the command line; none can be abbreviated."""
    words = sys.argv[1:] if argv is None else argv
    return [w[2:].split("=")[0] for w in words if w.startswith("--")]


def fail(message):
    """One sentence instead of a traceback; of several processes, one speaks."""
    sys.exit(f"error: {message}" if RANK == 0 else 1)


# --- Tokens ---------------------------------------------------------------------------------------------------------


def load_encoding(folder):
    """GPT-2's byte-pair encoding: from vocab.json and merges.txt in the checkpoint's folder, otherwise tiktoken's own."""
    vocab, merges = (Path(folder or "") / name for name in ("vocab.json", "merges.txt"))
    if folder and vocab.is_file() and merges.is_file():
        sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # tiktoken caches by path: a file may have changed
        try:
            ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(merges), str(vocab), sha256(merges), sha256(vocab))
            eos = json.loads(vocab.read_text(encoding="utf-8"))["<|endoftext|>"]
        except Exception:  # whatever a damaged file makes the reader raise
            fail(f"{vocab} and {merges} are damaged or not GPT-2's format; fetch them again, or delete them for GPT-2's own")
        return tiktoken.Encoding("gpt2-local", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eos})
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests has a zoo of them
        fail(
            f"cannot load GPT-2's vocabulary ({type(e).__name__}): tiktoken downloads it on first use; connect to the network "
            "once, set TIKTOKEN_CACHE_DIR to a folder that has it, or put vocab.json and merges.txt beside the weights of --init_from"
        )


# --- Data -----------------------------------------------------------------------------------------------------------


def read_jsonl(path):
    """Every object of a JSONL file, with `where` it stands for messages."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        fail(f"cannot read {path} ({e.strerror}); check the path")
    rows, odd = [], []
    for n, line in enumerate(lines, 1):
        where = f"{path}:{n}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if n == 1 else "utf-8"))  # some editors put a mark before the first line
        except UnicodeDecodeError as e:
            fail(f"{where}: byte {e.start} is not UTF-8; save the file as UTF-8")
        except (ValueError, RecursionError) as e:
            fail(f"{where}: not JSON ({str(e)[:80]}); write one object a line, with double quotes")
        if not isinstance(row, dict):
            fail(f"{where}: a line must be an object, not {type(row).__name__}; write it as {{...}}")
        if "privileged_context" in row:  # TRL's name
            if "demonstration" in row:
                fail(f"{where}: demonstration and privileged_context are the same field; remove one")
            row["demonstration"] = row.pop("privileged_context")
        odd += [f"{k!r} ({where})" for k in row if k not in ("prompt", "demonstration", "context", "answer", "text")]
        rows.append(row | {"where": where})
    if odd:
        say(f"note: {path} has fields that are not used, {len(odd)} in all, first {odd[0]}")
    if not rows:
        fail(f"{path} holds no rows; write one JSON object a line")
    return rows


def text_of(row, field, required=True):
    """A field's text, checked; None where an optional one is absent or null."""
    text = row.get(field)
    if text is None and not required:
        return None
    name = "demonstration (or privileged_context)" if field == "demonstration" else field
    if text is None:
        fail(f"{row['where']}: {name} is missing; add it to the line")
    if not isinstance(text, str):
        fail(f"{row['where']}: {name} must be text, not {type(text).__name__}; put it in double quotes")
    if not text.strip():
        fail(f"{row['where']}: {name} is empty; fill it in or remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        fail(f"{row['where']}: {name} holds half a surrogate pair, which is no character; write it as UTF-8 or a whole pair")
    return text


def load_data(path, enc, args, block_size, kind):
    """Rows with their token ids. kind "train" has demonstrations, "task" prompts and answers, "prior" texts or prompts and
    answers. Whatever a row is, special tokens in it are plain text: nobody's data ends a response."""
    encode, rows, too_long, glued = enc.encode_ordinary, [], [], []
    for row in read_jsonl(path):
        if kind == "prior" and "text" in row:
            out = {"text_ids": encode(text_of(row, "text"))}
            need = len(out["text_ids"])  # the end-of-text token stands before the first one, and the last one predicts nothing
        else:
            prompt, answer = text_of(row, "prompt"), text_of(row, "answer", required=kind != "train")
            out = {"prompt": prompt, "answer": answer, "prompt_ids": encode(student_context(prompt))}
            need = len(out["prompt_ids"]) + (len(encode(answer)) if kind == "prior" else args.max_new_tokens)
            if kind == "prior":
                out["answer_ids"] = encode(answer)
        if kind == "train":
            demonstration, context = text_of(row, "demonstration"), text_of(row, "context", required=False)
            out["teacher_ids"] = encode(teacher_context(prompt, demonstration, context))
            out["demonstration_ids"] = encode(demonstration) + [enc.eot_token]  # the end is learned, once
            need = max(need, len(out["prompt_ids"]) + len(out["demonstration_ids"]))
            need = max(need, len(out["teacher_ids"]) + args.max_new_tokens)
            if not prompt[-1].isspace() and not demonstration[0].isspace():
                glued.append(row["where"])
        if need > block_size:
            too_long.append((row["where"], need))
        else:
            rows.append(out)
    if too_long and not args.skip_long:
        fail(
            f"{too_long[0][0]}: prompt, demonstration and response need {too_long[0][1]} tokens, the model's block_size is "
            f"{block_size}; shorten the row, lower --max_new_tokens, or drop such rows ({len(too_long)}) with --skip_long"
        )
    if too_long:
        say(f"{path}: dropped {len(too_long)} of {len(too_long) + len(rows)} rows that exceed block_size {block_size} (--skip_long)")
    if not rows:
        fail(f"{path}: no row fits block_size {block_size}; shorten them or lower --max_new_tokens")
    if glued:
        say(f"note: prompt and demonstration meet without a space or line break in {len(glued)} rows, first at {glued[0]}")
    return rows


def minibatch(n, batch_size, step, seed):
    """Indices of step's rows: one shuffle of all n after the other, cut into batches. Alg. 1, step 1."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {e: np.random.default_rng([seed, 1, e]).permutation(n) for e in {p // n for p in places}}
    return [int(orders[p // n][p % n]) for p in places]


def pad_right(sequences, eos, device):
    """Token ids (B, C) and mask (B, C) of sequences of different lengths."""
    C = max(len(s) for s in sequences)
    tokens = torch.tensor([s + [eos] * (C - len(s)) for s in sequences], device=device)
    return tokens, torch.arange(C, device=device) < torch.tensor([[len(s)] for s in sequences], device=device)


def batches(pairs, size, block_size):
    """(prompts, completions) of at most `size` pairs, fewer where a long prompt beside a long completion would not fit."""
    while pairs:
        n = min(size, len(pairs))
        while n > 1 and sum(max(len(pair[i]) for pair in pairs[:n]) for i in (0, 1)) > block_size:
            n -= 1
        yield list(zip(*pairs[:n]))
        pairs = pairs[n:]


# --- Training -------------------------------------------------------------------------------------------------------


def sft_step(student, optimizer, rows, eos, args, sync):
    """One supervised update on the demonstrations; returns the loss and info, as `train_step` does."""
    device, total = student.wte.weight.device, 0.0
    pairs = [(r["prompt_ids"], r["demonstration_ids"]) for r in rows]
    for prompts, demonstrations in batches(pairs, args.micro_batch or len(rows), student.config.block_size):
        tokens, mask = pad_right(demonstrations, eos, device)
        loss = sft_loss(completion_logits(student, prompts, tokens), tokens, mask) * len(prompts) / len(rows)
        loss.backward()
        total += loss.item()
    sync(student)
    update(student, optimizer, total, args.clip)
    return total, {"mask": pad_right([r["demonstration_ids"] for r in rows], eos, device)[1]}


def generators(args, step, indices, device):
    """One random stream for every row of the step's minibatch, so that neither micro-batch nor process matters."""
    seeds = [int(np.random.SeedSequence([args.seed, 2, step, i]).generate_state(1)[0]) for i in indices]
    return [torch.Generator(device).manual_seed(s) for s in seeds]


def average_gradients(student):
    """The mean over processes: each has the mean over its equal share of the rows, so this is the whole minibatch's."""
    if WORLD > 1:
        for p in student.parameters():
            dist.all_reduce(p.grad)
            p.grad /= WORLD


def learning_rate(args, step):
    return args.lr * min(1.0, (step + 1) / max(args.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def train(run, args, device):
    """Updates from run["step"] to args.steps; saves, evaluates and logs on the way. False where a signal stopped it."""
    student, teacher, optimizer, enc = run["student"], run["teacher"], run["optimizer"], run["enc"]
    data, eos, out = run["sets"]["train"], enc.eot_token, Path(args.out_dir)
    alpha = {"ema": args.ema_alpha, "frozen": 0.0, "live": 1.0}[args.teacher]
    share = args.batch_size // WORLD
    mine = range(RANK * share, (RANK + 1) * share)  # places in the minibatch

    stop = []  # a signal waits for the end of the step, so that what is saved is whole; a second one does not wait
    for s in (signal.SIGINT, signal.SIGTERM):  # torchrun passes on what the terminal has sent already: no second one there
        signal.signal(s, lambda *_: signal.default_int_handler() if stop and WORLD == 1 else stop.append(1))
    start = last = time.perf_counter()
    first, tokens = run["step"], 0
    while run["step"] < args.steps:
        step = run["step"]
        indices = minibatch(len(data), args.batch_size, step, args.seed)
        rows = [data[indices[place]] for place in mine]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        try:
            with autocast(args, device):
                if args.method == "sft":
                    loss, info = sft_step(student, optimizer, rows, eos, args, average_gradients)
                else:
                    loss, info = train_step(
                        student, teacher, optimizer, [r["prompt_ids"] for r in rows], [r["teacher_ids"] for r in rows],
                        args.max_new_tokens, eos, kl=args.kl, alpha=alpha, temperature=args.temperature, clip=args.clip,
                        skip_tokens=args.skip_tokens, micro_batch=args.micro_batch,
                        generator=generators(args, step, mine, device), sync=average_gradients, sampler=run["sampler"],
                        chunk=CHUNK,
                    )  # fmt: skip
        except FloatingPointError as e:
            fail(f"step {step + 1}: {e}; {out / 'checkpoints'} is from before it")
        mask, kl = info["mask"], info.get("kl")
        cut = 0 if kl is None else (mask.all(1) & (info["completions"][:, -1] != eos)).sum().item()  # never ended
        kl_sum = 0.0 if kl is None else kl.sum().item()
        sums = torch.tensor([loss * share, kl_sum, mask.sum().item(), cut, len(stop)], device=device)
        if WORLD > 1:
            dist.all_reduce(sums)
        total, kl_sum, count, cut, stopped = sums.tolist()
        run["step"], tokens = step + 1, tokens + count
        done = run["step"] == args.steps

        if run["step"] % args.log_every == 0 or done:
            now = time.perf_counter()
            row = {"step": run["step"], "loss": total / args.batch_size, "kl": None if kl is None else kl_sum / count}
            row |= {"length": count / args.batch_size, "truncated": cut / args.batch_size, "lr": learning_rate(args, step)}
            row |= {"tokens_per_s": tokens / (now - last), "seconds": now - start}
            append(out / "metrics.jsonl", row)
            left = (now - start) / (run["step"] - first) * (args.steps - run["step"])
            say(
                f"step {run['step']:5}/{args.steps}  loss {row['loss']:.4f}  KL {'-' if kl is None else format(row['kl'], '.4f')}  "
                f"length {row['length']:5.1f}  truncated {row['truncated']:4.0%}  {row['tokens_per_s']:6.0f} tok/s  {left:4.0f} s left"
            )
            last, tokens = now, 0
        if RANK == 0 and (run["step"] % args.sample_every == 0 or done):
            save_samples(run, args, rows[:3], generators(args, step, mine, device)[:3], device)
        if RANK == 0 and run["step"] % args.eval_every == 0 and not done:
            append(out / "metrics.jsonl", {"step": run["step"], "eval": (scores := evaluate(student, run, args, device))})
            say(f"step {run['step']:5}/{args.steps}  " + "  ".join(f"{COLUMNS[k][0]} {show(k, scores)}" for k in COLUMNS))
            last, tokens = time.perf_counter(), 0
        if RANK == 0 and (run["step"] % args.save_every == 0 or done or stopped):
            save_checkpoint(out / "checkpoints", run, args)
        if WORLD > 1:
            dist.barrier()
        if stopped:
            return False
    return True


# --- Evaluation -----------------------------------------------------------------------------------------------------


def normal(text):
    """Lower case, single spaces, no full stop at the end: what an exact match may differ in."""
    return " ".join(text.lower().split()).rstrip(".")


def contains(response, answer):
    """A lenient match: the answer's words stand in the response, whole and in order. An answer without words must be equal."""
    words = lambda text: " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "
    return words(answer) in words(response) if words(answer).strip() else normal(response) == normal(answer)


def decode(enc, ids):
    """Text of ids up to the end token; ids beyond the encoding, which padded vocabularies have, show as U+FFFD."""
    ids = ids[: ids.index(enc.eot_token)] if enc.eot_token in ids else ids
    return b"".join(enc.decode_single_token_bytes(i) if i < enc.eot_token else b"\xff" for i in ids).decode("utf-8", "replace")


def respond(model, rows, run, args, key="prompt_ids"):
    """Greedy responses to rows' prompts, a batch at a time: rows, completions (B, C), mask (B, C) and texts."""
    size, enc = args.micro_batch or args.batch_size, run["enc"]
    for batch in (rows[i : i + size] for i in range(0, len(rows), size)):
        completions, mask = rollout(model, [r[key] for r in batch], args.max_new_tokens, enc.eot_token, temperature=0)
        yield batch, completions, mask, [decode(enc, ids) for ids in completions.tolist()]


@torch.no_grad()
def evaluate(model, run, args, device):
    """Scores of a model, all greedy. Of the new task: exact and lenient matches, mean response length and KL(model ‖ base)
    per token of its responses; OOD: lenient matches; of the prior set: perplexity of the texts, and the share of prompts whose
    answer is the likeliest continuation, token by token. Of the base also lenient matches with a demonstration in its prompt."""
    base, enc, sets, scores = run["base"], run["enc"], run["sets"], {}
    size, eos, block = args.micro_batch or args.batch_size, enc.eot_token, model.config.block_size
    exact, loose, length, kl = [], [], [], 0.0
    with autocast(args, device):

        def lenient(rows, key="prompt_ids"):
            return [contains(s, r["answer"]) for batch, *_, said in respond(model, rows, run, args, key) for s, r in zip(said, batch)]

        for rows, completions, mask, said in respond(model, sets["test"], run, args):
            exact += [normal(s) == normal(r["answer"]) for s, r in zip(said, rows)]
            loose += [contains(s, r["answer"]) for s, r in zip(said, rows)]
            length += mask.sum(1).tolist()
            if model is not base:
                logits = (completion_logits(m, [r["prompt_ids"] for r in rows], completions) for m in (model, base))
                kl += sdft_loss(*logits, mask)[1]["kl"].sum().item()
        if exact:
            scores |= {"exact": exact, "lenient": loose, "length": length, "kl_to_base": kl / sum(length)}
        if sets["ood"]:
            scores["ood"] = lenient(sets["ood"])
        if model is base and (rows := [r for r in sets["train"] if r["answer"]]):
            scores["with_demonstration"] = lenient(rows, "teacher_ids")

        nll, count, right = 0.0, 0, []
        texts = [([eos], r["text_ids"]) for r in sets["prior"] if "text_ids" in r]
        questions = [(r["prompt_ids"], r["answer_ids"]) for r in sets["prior"] if "answer_ids" in r]
        for prompts, completions in batches(texts, size, block + 1):
            tokens, mask = pad_right(completions, eos, device)
            logits = completion_logits(model, prompts, tokens).float()
            nll -= (logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0] * mask).sum().item()
            count += mask.sum().item()
        for prompts, completions in batches(questions, size, block):
            tokens, mask = pad_right(completions, eos, device)
            right += ((completion_logits(model, prompts, tokens).argmax(-1) == tokens) | ~mask).all(1).tolist()
    scores |= {"prior_ppl": math.exp(min(nll / count, 700))} if count else {}
    scores |= {"prior_acc": right} if right else {}
    return {k: float(np.mean(v)) for k, v in scores.items()}


@torch.no_grad()
def save_samples(run, args, rows, generator, device):
    """A few responses in samples.jsonl: every token with its KL and what the teacher would rather have said."""
    student, teacher, enc = run["student"], run["teacher"], run["enc"]
    prompts = [r["prompt_ids"] for r in rows]
    with autocast(args, device):
        completions, mask = rollout(student, prompts, args.max_new_tokens, enc.eot_token, args.temperature, generator)
        student_logits = completion_logits(student, prompts, completions)
        teacher_logits = completion_logits(teacher, [r["teacher_ids"] for r in rows], completions)  # (B, C, V)
    kl = sdft_loss(student_logits, teacher_logits, mask, args.kl)[1]["kl"]
    top = teacher_logits.float().softmax(-1).topk(3)
    token = lambda i: enc.decode_single_token_bytes(i).decode("utf-8", "replace") if i <= enc.eot_token else "\ufffd"
    for b, row in enumerate(rows):
        n = int(mask[b].sum())
        ids = completions[b, :n].tolist()
        best = [[[token(i), round(p, 4)] for i, p in zip(*pair)] for pair in zip(top.indices[b].tolist(), top.values[b].tolist())]
        tokens = [{"token": token(i), "kl": round(k, 5), "teacher": t} for i, k, t in zip(ids, kl[b].tolist(), best)]
        line = {"step": run["step"], "prompt": row["prompt"], "response": decode(enc, ids), "tokens": tokens}
        append(Path(args.out_dir) / "samples.jsonl", line)


# --- Files, log and tables ------------------------------------------------------------------------------------------


def say(line):
    if RANK == 0:
        print(line, flush=True)


def append(path, row):
    if RANK == 0:
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as e:
            fail(f"cannot write {path} ({e.strerror}); free some space or choose another --out_dir")


def forget_after(path, step):
    """Drop the lines of a log that a resumed run writes again, and a last line that a kill left unfinished."""
    if path.exists():
        keep = []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines() cuts at U+2028 too
            try:
                keep += [line + "\n"] if json.loads(line)["step"] <= step else []
            except (ValueError, KeyError, TypeError):
                pass
        write_atomically(path, lambda tmp: tmp.write_text("".join(keep), encoding="utf-8"))


def crc32(path):
    value = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def checkpoints(folder):
    return sorted(folder.glob("[0-9]*-[0-9a-f]*.pt"))


def save_checkpoint(folder, run, args):
    """Everything that a resumed run needs, in one file whose name carries its CRC-32: a damaged one is never believed."""
    state = {"args": vars(args), "step": run["step"], "scores": run["scores"], "inputs": run["inputs"]}
    state |= {k: run[k].state_dict() for k in ("student", "teacher", "optimizer")}
    make_folder(folder)
    write_atomically(folder / "new", lambda tmp: torch.save(state, tmp))
    os.replace(folder / "new", folder / f"{run['step']:08d}-{crc32(folder / 'new')}.pt")
    for old in [*checkpoints(folder)[:-2], *folder.glob(".*.tmp")]:
        old.unlink()


def load_checkpoint(folder):
    """The newest checkpoint's contents; None where there is none."""
    files = checkpoints(folder)
    if not files:
        return None
    remedy = f"delete it and --resume goes on from {files[-2].name}" if len(files) > 1 else "start again in another --out_dir"
    try:
        if crc32(files[-1]) != files[-1].stem.split("-")[1]:
            raise ValueError
        return torch.load(files[-1], map_location="cpu", weights_only=True)
    except Exception:
        fail(f"checkpoint {files[-1]} is damaged; {remedy}")


def show(key, scores):
    return COLUMNS[key][1].format(scores[key]) if key in scores else "-"


def print_table(rows):
    """rows: (label, scores)."""
    say("\n| | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |\n|---" + "|---:" * len(COLUMNS) + "|")
    for label, scores in rows:
        say(f"| {label} | " + " | ".join(show(k, scores) for k in COLUMNS) + " |")


def report(folders):
    rows = []
    for folder in folders:
        try:
            results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
            base, final, config = results["base"], results["final"], results["config"]
            before, after = ({k: float(scores[k]) for k in COLUMNS if k in scores} for scores in (base, final))
            if before not in [scores for _, scores in rows]:  # runs from one base share its row
                rows.append((f"base of {folder}", before))
            rows.append((f"{folder}: {config['method']}, {config['steps']} steps, lr {config['lr']:g}", after))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            fail(f"there is no readable results.json in {folder}; --report takes --out_dir of finished runs")
    print_table(rows)


# --- One run --------------------------------------------------------------------------------------------------------


def pick_device(args):
    name = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(1, device=name).item()
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"--device {name} is not available with this torch {torch.__version__}; leave the flag out, or use cpu")
    if WORLD > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # the others wait while rank 0 evaluates
    return device


def is_half(dtype, device):
    return dtype == "bfloat16" or dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(args, device):
    half = is_half(args.dtype, device)
    # no cache of cast weights: a cast made in the rollout, under no_grad, must not serve the pass that needs its gradient
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def make_optimizer(student, args):
    # fused: one pass over the weights, a fraction of the time on a CPU (`python -m bench`)
    return torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)


def make_sampler(student, args, device):
    """What rolls out, in a dtype of its own; None where that is the student in the dtype of the arithmetic."""
    half = is_half(args.dtype if args.rollout_dtype == "auto" else args.rollout_dtype, device)
    if args.cuda_graphs and device.type != "cuda":
        fail(f"--cuda_graphs needs an Nvidia GPU, and the device is {device}; leave the flag out")
    sampler = copy.deepcopy(student).bfloat16() if half else student
    if args.cuda_graphs:
        return GraphedGPT(sampler)
    return sampler if half or is_half(args.dtype, device) else None


def compile_scoring(model, device):
    """Compiles the passes without a key-value cache; in decoding every token would have a shape of its own."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as e:
        fail(f"--compile does not work here ({str(e).strip().splitlines()[0][:120]}); leave the flag out")
    plain, fast = model.hidden, torch.compile(model.hidden, dynamic=True)
    model.hidden = lambda idx, pad=None, cache=None: fast(idx, pad) if cache is None else plain(idx, pad, cache)


def settings_of(saved, args, given):
    """The interrupted run's settings; a given flag that contradicts them is an error, for then nothing would be resumed."""
    here = {k: getattr(args, k) for k in ("resume", "out_dir", "device")}
    for k in given:
        if k not in here and getattr(args, k) != saved.get(k):
            fail(f"--{k} {getattr(args, k)} differs from the run in {args.out_dir}, which has {saved.get(k)}; leave it out with --resume")
    return argparse.Namespace(**vars(args) | saved | here)  # a flag that the run did not know yet has its default


def source_folder(args):
    """Where --init_from keeps its weights, and perhaps a vocabulary; None for a model that is downloaded."""
    source = Path(args.init_from)
    return None if args.init_from in OPENAI else source if source.is_dir() else source.parent


def prepare(args, saved, device):
    """Model, teacher, optimiser, encoding and data: everything that `train` and `evaluate` read."""
    if not args.data:
        what = "there is no checkpoint to resume in --out_dir, and " if args.resume else ""
        fail(f"{what}--data is missing: name a JSONL file of prompts and demonstrations")
    files = {k: getattr(args, k) for k in ("data", "test", "ood", "eval") if getattr(args, k)}
    try:
        base = GPT.from_pretrained(args.init_from).to(device)
    except (ValueError, OSError) as e:
        fail(f"--init_from {args.init_from}: {e}")
    enc = load_encoding(source_folder(args))
    if enc.n_vocab > base.config.vocab_size:
        fail(
            f"--init_from {args.init_from} has a vocabulary of {base.config.vocab_size}, the encoding {enc.n_vocab}; put the "
            "checkpoint's vocab.json and merges.txt into its folder"
        )
    load = lambda name, kind: load_data(files[name], enc, args, base.config.block_size, kind) if name in files else []
    sets = {"train": load("data", "train"), "ood": load("ood", "task"), "prior": load("eval", "prior")}
    sets["test"] = load("test", "task") or [r for r in sets["train"] if r["answer"]]
    try:
        inputs = {k: crc32(path) for k, path in files.items()}
    except OSError as e:
        fail(f"cannot read {e.filename} ({e.strerror}); check the path")
    if saved and (changed := [k for k in inputs if inputs[k] != saved["inputs"].get(k)]):
        fail(f"--{changed[0]} {files[changed[0]]} has changed since the run began; restore it, or start in another --out_dir")

    student = copy.deepcopy(base)
    # a teacher that never moves is the base; with SFT it only reads the demonstrations in samples.jsonl
    teacher = base if args.method == "sft" or args.teacher == "frozen" else copy.deepcopy(base)
    optimizer = make_optimizer(student, args)
    run = {"base": base.requires_grad_(False), "student": student, "teacher": teacher.requires_grad_(False), "optimizer": optimizer}
    if saved:
        for k in ("student", "teacher", "optimizer"):
            run[k].load_state_dict(saved[k])
    run["sampler"] = make_sampler(student, args, device)
    if args.compile:
        for model in (student, teacher):
            compile_scoring(model, device)
    run |= {"step": saved["step"] if saved else 0, "scores": saved["scores"] if saved else {}}
    return run | {"enc": enc, "sets": sets, "inputs": inputs}


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.report:
            report(args.report)
        elif args.bench:
            run_bench(args)
        else:
            fine_tune(args, given_flags(argv))
    except (OSError, FloatingPointError) as e:
        fail(e)
    except torch.cuda.OutOfMemoryError:
        fail("the device's memory is full; lower --micro_batch, --max_new_tokens or --batch_size")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; where a checkpoint was saved, --resume goes on from it")


def run_bench(args):
    device = pick_device(args)
    torch.manual_seed(args.seed)
    try:
        if args.init_from in OPENAI:
            n_layer, n_head, n_embd = OPENAI[args.init_from]
            student = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).to(device)
        else:
            student = GPT.from_pretrained(args.init_from).to(device)
    except (ValueError, OSError) as e:
        fail(f"--init_from {args.init_from}: {e}")
    if bench.TEACHER_PROMPT + args.max_new_tokens > student.config.block_size:
        fail(f"--max_new_tokens {args.max_new_tokens} and a prompt of {bench.TEACHER_PROMPT} do not fit block_size {student.config.block_size}; lower it")
    dtype = torch.bfloat16 if is_half(args.dtype, device) else torch.float32
    sampler = make_sampler(student, args, device) or student
    with autocast(args, device):
        bench.bench(student, sampler, make_optimizer(student, args), CHUNK, args.batch_size, args.max_new_tokens, args.kl, dtype, device)


def fine_tune(args, given):
    out = Path(args.out_dir)
    saved = load_checkpoint(out / "checkpoints") if args.resume else None
    if saved:
        args = settings_of(saved["args"], args, given)
    elif not args.resume and ((out / "results.json").exists() or checkpoints(out / "checkpoints")):
        fail(f"{out} already holds a run; go on with it by --resume, or choose another --out_dir")
    elif (source := source_folder(args)) and out.resolve() == source.resolve():
        fail(f"--out_dir {out} is where --init_from lies, which it would overwrite; choose another --out_dir")
    if args.batch_size % WORLD:
        fail(f"--batch_size {args.batch_size} must be a multiple of the {WORLD} processes; change one of them")
    device = pick_device(args)
    torch.manual_seed(args.seed)
    run = prepare(args, saved, device)
    sets, began = run["sets"], time.perf_counter()
    make_folder(out)
    say(
        f"{args.method} from {args.init_from}: {sum(p.numel() for p in run['student'].parameters()) / 1e6:.1f}M parameters, "
        f"{len(sets['train'])} rows, {args.steps} steps of {args.batch_size} rows\n"
        f"device {device} x {WORLD}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{'bfloat16' if autocast(args, device)._enabled else 'float32'}"
    )
    if RANK == 0:
        for name in ("metrics.jsonl", "samples.jsonl"):
            forget_after(out / name, run["step"] if saved else -1)
        if not saved:
            run["scores"] = {"base": evaluate(run["base"], run, args, device)}
            append(out / "metrics.jsonl", {"step": 0, "eval": run["scores"]["base"]})
            save_checkpoint(out / "checkpoints", run, args)  # from here on the folder can be resumed
        able = run["scores"]["base"].get("with_demonstration", 1)
        if args.method == "sdft" and able < 0.5:
            say(f"note: with the demonstration in its prompt the base answers {able:.0%} right, so there is little to distil")
        say("base  " + "  ".join(f"{COLUMNS[k][0]} {show(k, run['scores']['base'])}" for k in COLUMNS))
    if saved:
        say(f"resumed at step {run['step']}")
    if WORLD > 1:
        dist.barrier()

    finished = train(run, args, device)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on nothing is lost: all is in a checkpoint
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not finished:
        say(f"stopped after step {run['step']}, saved; go on with: python train_gpt2.py --resume --out_dir {out}")
        return close(130)
    if RANK == 0:
        final = evaluate(run["student"], run, args, device)
        append(out / "metrics.jsonl", {"step": run["step"], "eval": final})
        run["student"].save_pretrained(out)
        if source := source_folder(args):  # a checkpoint's own vocabulary goes where its weights go
            for file in (source / name for name in TOKENIZER_FILES if (source / name).is_file()):
                write_atomically(out / file.name, lambda tmp: shutil.copyfile(file, tmp))
        results = {"config": vars(args), "base": run["scores"]["base"], "final": final, "seconds": time.perf_counter() - began}
        write_atomically(out / "results.json", lambda tmp: tmp.write_text(json.dumps(results, indent=1) + "\n"))
        print_table([("base", run["scores"]["base"]), (f"{args.method}, {args.steps} steps", final)])
        say(f"\nweights, results.json, metrics.jsonl and samples.jsonl are in {out}; {results['seconds']:.0f} s")
    close(0)


def close(code):
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
