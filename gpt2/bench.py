"""What an SDFT update of GPT-2 costs on this machine, with random weights.

    python -m gpt2.bench             # ours
    python -m gpt2.bench --peers     # beside transformers' generate and TRL's trainer
    python -m gpt2.bench --device cuda

Times are medians after one that does not count. Every response has its full length. Every update
runs in a process of its own, with a peak of its own. Ours keep freed memory, as gpt2.train does;
TRL's are shown without and with that.
"""

import argparse
import contextlib
import importlib.metadata
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from data import files
from gpt2 import checkpoint, fast, lora, train
from model import GPT, GPT2_SIZES, GPTConfig

NO_END = -1  # in place of an end token: every response has its full length
PACKAGES = ("transformers", "trl")  # of --peers
ROLLOUT, UPDATE = (8, 64, 64), (8, 32, 32)  # --peers: rows, tokens of a prompt, of a response
ADAPTERS = "--lora_rank 16 --micro_batch 2"
OURS = {  # label: settings of gpt2.train
    "ours float32": "--dtype float32",
    "ours bfloat16": "--dtype bfloat16",
    f"ours float32, {ADAPTERS}": f"--dtype float32 {ADAPTERS}",
}
COMPARED = [
    ("TRL float32", "ours float32"),
    ("TRL float32, freed memory kept", "ours float32"),
    ("TRL as it comes", "ours bfloat16"),
    ("TRL float32", f"ours float32, {ADAPTERS}"),
]
# Fields of TRL's SDFTConfig that make it compute what gpt2.train does by default.
TRL = {"teacher_model_kind": "ema", "teacher_update_rate": 0.02, "teacher_sync_steps": 1}
TRL |= {"distillation_mode": "full_logits", "distillation_alpha": 1.0, "max_prompt_length": None}
TRL |= {"num_generations": 1, "num_iterations": 1, "steps_per_generation": 1}
TRL |= {"gradient_accumulation_steps": 1, "report_to": "none"}
TRL |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}


def ends_of(f, n, device):
    """When each of n calls ended."""
    ends = []
    for _ in range(n):
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return ends


def median_seconds(ends):
    return statistics.median(b - a for a, b in zip(ends, ends[1:]))


def peak_memory(device):
    """MiB of this process alone; NaN without /proc. getrusage would count its parent too."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(s.split()[1]) / 1024 for s in lines if s.startswith("VmHWM")), float("nan"))


def in_a_process(function, *arguments):
    """What a function returns in a process of its own, whose peak starts afresh."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def random_prompts(*shape):
    return torch.randint(98, shape).tolist()  # of the words of `their_updates`


@torch.no_grad()
def rollout_seconds(folder, dtype, device, **fastest):
    """Of transformers' generate and of ours."""
    from transformers import GPT2LMHeadModel

    B, P, C = ROLLOUT
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval().to(device)
    theirs.generation_config.eos_token_id = None
    ours = fast.RolloutGPT(GPT.from_pretrained(folder).to(device), dtype)
    prompts = torch.randint(ours.config.vocab_size, (B, P), device=device)

    options = {"do_sample": True, "top_k": 0, "max_new_tokens": C, "pad_token_id": 0} | fastest
    options["attention_mask"] = torch.ones_like(prompts)

    def roll_out():
        generators = fast.row_generators(0, 0, range(B), torch.device(device))
        fast.rollout(ours, prompts.tolist(), C, NO_END, 1.0, generators)

    both = lambda: theirs.generate(prompts, **options), roll_out
    return [median_seconds(ends_of(f, 6, device)) for f in both]


def update(label, folder, shape, device):
    """Median seconds of the updates after the first, and MiB of this process's peak."""
    if label in OURS or "freed memory kept" in label:
        fast.keep_freed_memory()
    updates = our_updates if label in OURS else their_updates
    return median_seconds(updates(label, folder, device, *shape, steps=4)), peak_memory(device)


def our_updates(label, folder, device, B, P, C, steps):
    """When each of our updates ended."""
    args = train.parse_args(["--out_dir", "unused", "--device", device, *OURS[label].split()])
    device = train.pick_device(device)
    student = fast.save_memory(GPT.from_pretrained(folder).to(device))
    if args.lora_rank:
        lora.add_adapters(student, args.lora_rank, args.lora_alpha)
    roles = student, lora.share(student).requires_grad_(False), train.make_optimizer(student, args)
    options = {"rollout_dtype": train.rollout_dtype(args, device), "micro_batch": args.micro_batch}
    options["generators"] = fast.row_generators(0, 0, range(B), device)

    def one():
        contexts = random_prompts(B, P), random_prompts(B, 2 * P)
        with train.autocast(args, device):
            fast.train_step(*roles, *contexts, C, NO_END, **options)

    return ends_of(one, steps, device.type)


def their_updates(label, folder, device, B, P, C, steps):
    """When each update of TRL's trainer ended."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(98))]  # a token per word
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    texts = [" ".join(f"w{i}" for i in row) for row in random_prompts(2 * steps * B, P)]
    rows = [{"prompt": a, "privileged_context": b} for a, b in zip(texts[::2], texts[1::2])]
    options = {"output_dir": f"{folder}/trl", "learning_rate": 1e-5, "max_steps": steps}
    options |= {"per_device_train_batch_size": B, "max_completion_length": C}
    options |= {"use_cpu": device == "cpu"}
    if "float32" in label:  # As it comes: autocast to bfloat16, and whole blocks recomputed.
        options |= {"bf16": False, "gradient_checkpointing": False}
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    args = SDFTConfig(**TRL, **options)
    with contextlib.redirect_stdout(sys.stderr):
        SDFTTrainer(model=folder, args=args, callbacks=[Clock()], **data).train()
    return ends


def print_table(rows):
    """Markdown of (what, theirs, ours)."""
    number = lambda x: f"{x:,.2f}" if x < 20 else f"{x:,.0f}"
    print("\n| | transformers / TRL | ours | ours / theirs |\n|---|---:|---:|---:|", flush=True)
    for what, a, b in rows:
        print(f"| {what} | {number(a)} | {number(b)} | {b / a:.2f} |", flush=True)


def compared(folder, updates, device):
    """Rows of the table, of {label: (seconds, MiB)} of the updates, and of rollouts."""
    B, P, C = UPDATE
    for i, what in enumerate([f"update {B} × ({P} + {C}), s", "peak memory of it, MiB"]):
        for pair in COMPARED:
            yield f"{what}: {', '.join(pair)}", *(updates[label][i] for label in pair)
    B, P, C = ROLLOUT
    # On a GPU `generate` is fastest with a cache that has a fixed shape, since it is compiled then.
    for options in [{}] + [{"cache_implementation": "static"}] * (device == "cuda"):
        for dtype in ("float32", "bfloat16"):
            seconds = rollout_seconds(folder, getattr(torch, dtype), device, **options)
            what = ", ".join([f"rollout {B} × ({P} + {C}), {dtype}", *options.values()])
            yield f"{what}, tokens/s", *(B * C / s for s in seconds)


def bench(student, peers, device):
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is looked up in the network
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL's trainer would use several
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if peers]
    machine = "{machine}, {threads} threads, torch {torch}".format(**files.machine(device))
    print(", ".join([machine, torch.backends.cpu.get_cpu_capability(), *versions]))
    theirs, updates = [label for label, _ in COMPARED] if peers else [], {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_model(student, folder)
        for label in dict.fromkeys([*theirs, *OURS]):
            took, peak = updates[label] = in_a_process(update, label, folder, UPDATE, device)
            print(f"an update, {label}: {took:.2f} s, peak memory {peak:,.0f} MiB", flush=True)
        if peers:
            print_table(compared(folder, updates, device))


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("--peers", action="store_true", help="compare with transformers and TRL")
    p.add_argument("--init_from", default="gpt2", help="a size by its name, or a checkpoint folder")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    p.add_argument("--device", default="cpu", choices=devices, help="where to compute")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(0)
    with files.errors_in_a_sentence("interrupted"):
        if args.init_from in GPT2_SIZES:
            student = GPT(GPTConfig(1024, 50257, *GPT2_SIZES[args.init_from]))
        else:
            student = checkpoint.load_model(args.init_from)
        try:
            bench(student, args.peers, args.device)
        except ImportError as e:
            raise ValueError(f"--peers needs {e.name}: pip install {' '.join(PACKAGES)}") from None


if __name__ == "__main__":
    main()
