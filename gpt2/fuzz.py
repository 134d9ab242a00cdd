"""Damaged files, flags, checkpoints and environments: does every run end in order?

    python -m gpt2.fuzz --cases 500 --seed 0

Every case calls `gpt2.train.main` once, on a model of toy size, with one thing damaged at random.
In order is exit code 0, or another one with exactly one sentence, "error: ...", and no traceback.
A case follows from the seed and its number; the table shows the first ones that failed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from gpt2 import checkpoint, settings, train
from gpt2.conftest import flags, small_gpt, write_rows, write_vocabulary

TEXTS = ["", " ", "\n", "\0", "é", "\udcff", "a" * 5000, "{", "{prompt}", "nan", "-1", "1e999"]
VALUES = [None, True, 0, -1, 1.5, 10**400, [], {}, [[]], "\ud800", " " * 10**6 + "x", *TEXTS]


def damage_bytes(content, r):
    """One thing changed: a piece lost, doubled, of noise or off by a bit, or all of it."""
    start, n = r.randrange(len(content) + 1), r.choice([1, 2, 20, 2000])
    middle, end = content[start : start + n], content[start + n :]
    middle = r.choice([b"", middle * 2, r.randbytes(n), bytes(b ^ 1 for b in middle[:1])])
    odd = [b"", b"null", b"[" * 10**5, b"9" * 5000, b"\xff\xfe", b'{"a": 1, "a": 2}']
    return r.choice([content[:start] + middle + end] * 3 + [content[:start], r.choice(odd)])


def odd_tensor(w, r):
    kinds = ["meta", torch.complex64, torch.int64, torch.float64]
    others = [w[None], w.flatten(), w.to_sparse(), torch.zeros(1).expand(10**5, 10**5)]
    return r.choice([w.to(r.choice(kinds)), w * r.choice([1e30, float("nan")]), r.choice(others)])


def damage_tree(tree, r):
    """JSON, or a checkpoint's state, with one value in it replaced or lost."""
    if isinstance(tree, torch.Tensor):
        return odd_tensor(tree, r)
    if not isinstance(tree, (dict, list)) or not tree or r.random() < 0.1:
        return r.choice(VALUES)
    key = r.choice([*tree] if isinstance(tree, dict) else range(len(tree)))
    tree[key] = damage_tree(tree[key], r)
    if r.random() < 0.2:
        del tree[key]
    return tree


def damage_file(path, r):
    """As bytes, or what a JSON, JSONL or PyTorch file holds."""
    if r.random() < 0.4 or path.suffix not in (".json", ".jsonl", ".bin", ".pt"):
        path.write_bytes(damage_bytes(path.read_bytes(), r))
    elif path.suffix == ".json":
        path.write_text(json.dumps(damage_tree(json.loads(path.read_text()), r)))
    elif path.suffix == ".jsonl":
        row, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_rows(path, [damage_tree(row, r), *rows])
    else:
        torch.save(damage_tree(torch.load(path, weights_only=True), r), path)


def start(d, *more):
    return flags(d / "base", d / "data", d / "out", *more, steps=1)


def resume(d):
    return ["--resume", "--out_dir", str(d / "run")]


FILES = {  # kind of case: files, of which one is damaged, and the arguments
    "data": ("data/train.jsonl data/ood.jsonl data/prior.jsonl", start),
    "long data": ("data/train.jsonl", lambda d: start(d, "--skip_long", "--method", "sft")),
    "template": ("data/t.txt", lambda d: start(d, "--teacher_template", d / "data" / "t.txt")),
    "weights": ("base/model.safetensors base/pytorch_model.bin", start),
    "configuration": ("base/config.json base/vocab.json base/merges.txt", start),
    "logs": ("run/metrics.jsonl run/samples.jsonl run/results.json run/config.json", resume),
    "report": ("run/results.json", lambda d: ["--report", str(d / "run"), str(d / "run")]),
}


def file(kind, d, r):
    """Of a case: the arguments and the environment, after something in the folder d is damaged."""
    names, argv = FILES[kind]
    name = r.choice(names.split())
    damage_file(d / name, r)
    if name == "base/pytorch_model.bin":
        (d / "base" / "model.safetensors").unlink(missing_ok=True)
    return argv(d), {}


def flag(d, r):
    names = [*settings.TEXTS, *settings.CHOICES, *settings.NUMBERS, "teacher_reads", "other"]
    values = [*TEXTS, "0", "1", "2", "1e30", "99999", "hpu", "meta", "sft", "article", d]
    return start(d, f"--{r.choice(names)}", r.choice(values), *r.choice([[], ["--resume"]])), {}


def folder(d, r):
    (d / "loop").symlink_to(d / "loop")
    (d / "file").write_text("x")
    (d / "full").mkdir()
    names = ("results.json", "vocab.json", "metrics.jsonl", "checkpoints", "model.safetensors")
    (d / "full" / r.choice(names)).write_text("x")
    out = r.choice(["loop", "loop/x", "file", "file/x", "full", "base", "run", "x" * 300, "é\n"])
    return start(d, "--out_dir", d / out, *r.choice([[], ["--resume"]])), {}


def saved(d, r):
    newest = checkpoint.run_checkpoints(d / "run" / "checkpoints")[-1]
    damage_file(newest, r)
    if r.random() < 0.8:  # a right checksum
        newest.rename(newest.with_name(f"{newest.name[:8]}-{checkpoint.crc32(newest)}.pt"))
    return resume(d), {}


def environment(d, r):
    name = r.choice(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
    return start(d), {name: r.choice(["abc", "-1", "0", "1", "2", "1e3", "é", ""])}


KINDS = {kind: partial(file, kind) for kind in FILES}
KINDS |= {"flag": flag, "--out_dir": folder, "checkpoint": saved, "environment": environment}


def prepare(d):
    """A base with both weight files, data, and a finished run of two steps."""
    (d / "base").mkdir(parents=True)
    (d / "data").mkdir()
    write_vocabulary(d / "base")
    model = small_gpt(noise=0.2, ends=3.0, n_embd=16)
    checkpoint.save_model(model, d / "base")
    torch.save(model.checkpoint(), d / "base" / "pytorch_model.bin")
    row = {"prompt": "What?\n", "demonstration": "It is.", "article": "A.", "answer": "It"}
    write_rows(d / "data" / "train.jsonl", [row] * 4)
    write_rows(d / "data" / "ood.jsonl", [row])
    write_rows(d / "data" / "prior.jsonl", [{"text": "The cat."}])
    (d / "data" / "t.txt").write_text("{article}\n{prompt} or {demonstration}?")
    train.main(flags(d / "base", d / "data", d / "run", steps=2))


def run(argv, variables):
    """Exit code (None for a traceback), and what was wrong with the end or None."""
    errors = io.StringIO()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)  # A run that hangs says that it was interrupted, which is no error sentence.
    try:
        with mock.patch.dict(os.environ, variables), contextlib.redirect_stderr(errors):
            train.main(argv)
        return 0, None
    except SystemExit as e:
        code, said = (e.code, errors.getvalue()) if type(e.code) is int else (1, str(e.code))
        one = said.count("error: ") == 1 and "error: " in said.splitlines()[-1]  # after the usage
        return code, None if one or code == 0 else f"it says {said!r}"
    except BaseException as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        return None, f"{type(e).__name__}: {str(e)[:100]!r} in {at.filename}:{at.lineno}"
    finally:
        signal.alarm(0)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--cases", type=int, default=500)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    codes, bad = {kind: Counter() for kind in KINDS}, []
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
        good, d = Path(tmp) / "good", Path(tmp) / "d"  # always d, as checkpoints hold its paths
        prepare(d)
        shutil.copytree(d, good)
        for case in range(args.cases):
            shutil.rmtree(d)
            shutil.copytree(good, d)
            kind, r = [*KINDS][case % len(KINDS)], random.Random(f"{args.seed} {case}")
            with contextlib.chdir(d):  # since --out_dir may be anything
                code, wrong = run(*KINDS[kind](d, r))
            codes[kind]["traceback" if code is None else code] += 1
            bad += [f"case {case}, {kind}: {wrong}"] if wrong else []
    print("| what is damaged | cases | exit code: cases |\n|---|---:|---|")
    for kind, counter in codes.items():
        shown = ", ".join(f"{code}: {counter[code]}" for code in sorted(counter, key=str))
        print(f"| {kind} | {sum(counter.values())} | {shown} |")
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{len(bad)} failed; at most {mib:.0f} MiB of memory", *bad[:20], sep="\n")
    return len(bad)


if __name__ == "__main__":
    raise SystemExit(main() > 0)
