"""The flags of `python -m gpt2.train`, and the device, dtypes and optimizer that they ask for."""

import argparse
import math
import shlex
import sys

import torch

from gpt2 import lora
from gpt2.data import TEMPLATES

TEXTS = {  # flag: (default, help)
    "init_from": (
        "gpt2",
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or weights file in Hugging Face's "
        "GPT-2 format, e.g. the --out_dir of a finished run",
    ),
    "base": (
        None,
        "the model that the KL is measured to, e.g. the original one if --init_from names a "
        "finished run (default: --init_from)",
    ),
    "data": (None, "JSONL to learn from: prompt, demonstration, article, answer"),
    "test": (None, "JSONL of prompt and answer for the scores (default: rows of --data)"),
    "ood": (None, "JSONL of prompt and answer that asks for the same in another way"),
    "eval": (None, "JSONL of prior abilities, never trained on: text, or prompt and answer"),
    "out_dir": (None, "folder for everything that is written"),
    "device": (None, "cpu, cuda or mps (default: the best available)"),
}
CHOICES = {  # flag: (choices, the default first; help)
    "method": (("sdft", "sft"), "self-distillation, or cross entropy on the demonstrations"),
    "divergence": (
        ("reverse", "forward", "jsd"),
        "of the SDFT loss: reverse is the paper's Eq. (1), forward is behind its results",
    ),
    "teacher": (
        ("ema", "frozen", "live"),
        "the teacher's weights: moving average of the student, the start, the student itself",
    ),
    "keep": (
        ("last", "best"),
        "best: also the weights of the evaluation with the best score on --test, in OUT_DIR/best",
    ),
    "dtype": (
        ("auto", "float32", "bfloat16"),
        "of the arithmetic; weights, optimizer and EMA stay in float32; auto is bfloat16 on GPUs "
        "that have it",
    ),
    "rollout_dtype": (
        ("auto", "float32", "bfloat16"),
        "of the weights that sample; bfloat16 is a copy of half the size; auto is that of --dtype",
    ),
}
NUMBERS = {  # flag: (default, lowest, highest, help)
    "ema_alpha": (0.02, 0, 1, "EMA rate: the student's share in the teacher at every update"),
    "skip_tokens": (0, 0, 2**31, "tokens at a response's start without loss; released code: 3"),
    "temperature": (1.0, 0, 100, "sampling temperature of the rollouts; 0 is greedy"),
    "max_new_tokens": (64, 1, 2**31, "length at which a response is cut off"),
    "steps": (100, 1, 2**31, "updates"),
    "batch_size": (8, 1, 2**16, "rows per update, over all processes"),
    "micro_batch": (None, 1, 2**31, "rows per forward/backward pass; saves memory (default: all)"),
    "lr": (1e-5, 0, 1, "peak learning rate"),
    "lora_rank": (
        None,
        1,
        2**16,
        "train adapters of this rank on the linear layers, and no other weight (default: none)",
    ),
    "lora_alpha": (16.0, 1e-6, 1e6, "an adapter's share is multiplied by alpha / rank"),
    "warmup": (10, 0, 2**31, "updates of linear warm-up; the learning rate's cosine ends at 0"),
    "weight_decay": (0.0, 0, 1, "of AdamW"),
    "grad_clip": (1.0, 1e-6, 1e6, "largest gradient norm"),
    "seed": (0, 0, 2**63 - 1, "of the order of the rows and of the sampling"),
    "log_every": (10, 1, 2**31, "updates between log lines"),
    "eval_every": (50, 1, 2**31, "updates between evaluations, each with samples"),
    "save_every": (50, 1, 2**31, "updates between checkpoints; the newest two are kept"),
}


def parse_args(description, argv=None):
    """The settings, and the names of the flags that were given."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False)
    shown = " (default: %(default)s)"
    for name, (default, text) in TEXTS.items():
        p.add_argument(f"--{name}", default=default, help=text + (shown if default else ""))
    for name, (choices, text) in CHOICES.items():
        p.add_argument(f"--{name}", choices=choices, default=choices[0], help=text + shown)
    for name, (default, _, _, text) in NUMBERS.items():
        kind, tail = (int, "") if default is None else (type(default), shown)
        p.add_argument(f"--{name}", type=kind, default=default, help=text + tail)
    p.add_argument(
        "--old",
        nargs="+",
        metavar="FILE",
        help="JSONL of prompt and answer, of tasks learned earlier, which every evaluation scores",
    )
    reads = p.add_mutually_exclusive_group()
    reads.add_argument(
        "--teacher_reads",
        choices=tuple(TEMPLATES),
        default="both",
        help="article: the article and the prompt; demonstration: the paper's template; both: the "
        "template, and the article in front if the row has one" + shown,
    )
    reads.add_argument(
        "--teacher_template",
        metavar="FILE",
        help="text file with {prompt}, {demonstration}, {article}, in place of the template",
    )
    p.add_argument(
        "--skip_long",
        action="store_true",
        help="drop and count rows that do not fit the model's n_positions, instead of stopping",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out_dir with the settings of its run, or start",
    )
    p.add_argument("--report", nargs="+", metavar="RUN", help="print a table of finished runs")
    args = p.parse_args(argv)
    try:
        check(args)
    except ValueError as e:
        p.error(str(e))
    if not args.report and not args.out_dir:
        p.error("--out_dir is missing: name a folder for what the run writes")
    words = sys.argv[1:] if argv is None else argv
    return args, {word[2:].split("=")[0] for word in words if word.startswith("--")}


def command(args):
    """The command line of a run: the flags that are not at their defaults."""
    words, defaults = ["python", "-m", "gpt2.train"], vars(parse_args("", ["--out_dir", "."])[0])
    for name, value in vars(args).items():
        if value != defaults[name] and name != "resume":
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def check(args):
    """Types and ranges of all settings, from the command line or a checkpoint; or a ValueError."""
    for name in (*TEXTS, "teacher_template"):
        value = getattr(args, name)
        if value is not None and not (type(value) is str and is_utf8(value)):
            raise ValueError(f"--{name} must be text in UTF-8, without a NUL character")
    for file in [] if args.old is None else args.old:
        if not (type(file) is str and is_utf8(file)):
            raise ValueError("--old must be names of files in UTF-8, without a NUL character")
    for name, (default, low, high, _) in NUMBERS.items():
        value, kind = getattr(args, name), int if default is None else type(default)
        if value is None and default is None:
            continue
        if type(value) is not kind or not low <= value <= high:  # NaN fails too
            raise ValueError(f"--{name} must lie between {low} and {high}")
    choices = {name: names for name, (names, _) in CHOICES.items()} | {"teacher_reads": TEMPLATES}
    for name, names in choices.items():
        if getattr(args, name) not in tuple(names):
            raise ValueError(f"--{name} must be one of {', '.join(names)}")
    if 0 < args.temperature < 0.01:
        raise ValueError("--temperature must be 0 (greedy) or at least 0.01")
    if args.skip_tokens >= args.max_new_tokens:
        raise ValueError("--skip_tokens must be below --max_new_tokens, or no token has a loss")


def is_utf8(text):
    """A path's bytes that are not UTF-8 reach Python as surrogates."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


# --- Device, dtype, optimizer ---------------------------------------------------------------------


def pick_device(name, local_rank=None):
    """The named device or the best available; of several GPUs, that of this process."""
    if name is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except Exception:  # each backend has its own
        raise ValueError(
            f"--device {name} is not available with torch {torch.__version__}; leave the flag out, "
            "or use cpu"
        ) from None
    return device


def compute_dtype(name, device):
    half = name == "bfloat16"
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if half else torch.float32


def autocast(args, device):
    half = compute_dtype(args.dtype, device) == torch.bfloat16
    # No cache of cast weights: a cast made under no_grad must not serve a pass with gradients.
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def make_optimizer(student, args):
    weights = lora.trained(student).values()
    # fused: one pass over the weights, several times as fast on a CPU.
    return torch.optim.AdamW(weights, lr=args.lr, weight_decay=args.weight_decay, fused=True)


def rollout_dtype(args, device):
    name = args.dtype if args.rollout_dtype == "auto" else args.rollout_dtype
    return compute_dtype(name, device)


def learning_rate(step, steps, lr, warmup):
    """Linear warm-up, times a cosine that ends at 0."""
    return lr * min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
