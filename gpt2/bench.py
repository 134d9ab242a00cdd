"""What an SDFT update of GPT-2 costs on this machine, with random weights.

    python -m gpt2.bench             # the phases of an update
    python -m gpt2.bench --peers     # transformers' generate and TRL's trainer beside ours

Times are medians of several runs after one that does not count. Beside the peers every response has
its full length, and every update runs in a process of its own, whose peak memory is then its own.
Ours keep freed memory, as gpt2.train does; TRL's are shown without and with that.
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

from gpt2 import checkpoint, fast, lora, train
from model import GPT, GPT2_SIZES, GPTConfig

NO_END = -1  # in place of an end token: every response has its full length
PACKAGES = {"transformers": "5.24.0", "trl": "1.16.0"}
ROLLOUT, UPDATE = (8, 64, 64), (8, 32, 32)  # --peers: rows, tokens of a prompt, of a response
OURS = {  # label: settings of gpt2.train
    "ours float32": {},
    "ours bfloat16": {"dtype": "bfloat16"},
    "ours float32, --lora_rank 16 --micro_batch 2": {"lora_rank": 16, "micro_batch": 2},
}
COMPARED = [
    ("TRL float32", "ours float32"),
    ("TRL float32, freed memory kept", "ours float32"),
    ("TRL as it comes", "ours bfloat16"),
    ("TRL float32", "ours float32, --lora_rank 16 --micro_batch 2"),
]
TRL = {  # fields of TRL's SDFTConfig that make it compute what gpt2.train does by default
    **{"teacher_model_kind": "ema", "teacher_update_rate": 0.02, "teacher_sync_steps": 1},
    **{"distillation_mode": "full_logits", "distillation_alpha": 1.0, "max_prompt_length": None},
    **{"num_generations": 1, "num_iterations": 1, "steps_per_generation": 1},
    **{"gradient_accumulation_steps": 1, "use_cpu": True, "report_to": "none"},
    **{"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True},
}
# Nothing is looked up in the network, and nothing else is printed.
QUIET = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def median_seconds(f, repeats=5):
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_memory():
    """MiB of this process alone; NaN without Linux's /proc. getrusage would count its parent too."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(s.split()[1]) / 1024 for s in lines if s.startswith("VmHWM")), float("nan"))


def in_a_process(function, *arguments):
    """What a function returns in a process of its own, whose peak starts afresh."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def random_prompts(*shape):
    return torch.randint(98, shape).tolist()  # of the words of `their_updates`


def machine(*packages):
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    cpu = f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return ", ".join([cpu, f"torch {torch.__version__}", *versions])


# --- The phases of an update ----------------------------------------------------------------------


def updater(args, student, B, P, C, device):
    """A function that makes one update on B rows of random tokens."""
    if args.lora_rank:
        lora.add_adapters(student, args.lora_rank, alpha=16.0)
    roles = student, lora.share(student).requires_grad_(False), train.make_optimizer(student, args)
    options = {"rollout_dtype": train.rollout_dtype(args, device), "micro_batch": args.micro_batch}
    options["generators"] = fast.row_generators(0, 0, range(B), device)

    def update():
        contexts = random_prompts(B, P), random_prompts(B, 2 * P)
        with train.autocast(args, device):
            fast.train_step(*roles, *contexts, C, NO_END, **options)

    return update


def bench_update(args, student, device):
    """Print the table for args.batch_size rows, and responses of args.max_new_tokens tokens."""
    B, P, C = args.batch_size, 64, args.max_new_tokens
    dtype = train.rollout_dtype(args, device)
    print(f"{device}, {machine()}\n{args.init_from}, --dtype {args.dtype}, rollout in {dtype}")
    print(f"batch {B}, prompt {P}, teacher's prompt {2 * P}, completion {C} tokens\n", flush=True)
    rollout_model, prompts = fast.RolloutGPT.of(student, dtype), random_prompts(B, P)
    generators = fast.row_generators(0, 0, range(B), device)
    roll_out = lambda: fast.rollout(rollout_model, prompts, C, NO_END, 1.0, generators)
    rollout = median_seconds(roll_out)
    update = median_seconds(updater(args, student, B, P, C, device))
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_memory()
    phases = {"rollout": rollout, "packing, scoring, backward, AdamW, EMA": update - rollout}
    print("| phase | ms | share |\n|---|---:|---:|")
    for phase, took in (phases | {"the update": update}).items():
        print(f"| {phase} | {1e3 * took:,.0f} | {took / update:.0%} |")
    print(f"\nrollout: {B * C / rollout:.0f} tokens/s\npeak memory: {peak:,.0f} MiB")


# --- Beside transformers and TRL ------------------------------------------------------------------


@torch.no_grad()
def rollout_seconds(folder, dtype):
    """Of transformers' generate and of ours."""
    from transformers import GPT2LMHeadModel

    B, P, C = ROLLOUT
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None
    student = GPT.from_pretrained(folder)
    ours = fast.RolloutGPT.of(student, dtype)
    prompts = torch.randint(student.config.vocab_size, (B, P))

    options = {"do_sample": True, "top_k": 0, "max_new_tokens": C, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompts)

    def roll_out():
        generators = fast.row_generators(0, 0, range(B), "cpu")
        fast.rollout(ours, prompts.tolist(), C, NO_END, 1.0, generators)

    return [median_seconds(f) for f in (lambda: theirs.generate(prompts, **options), roll_out)]


def update(label, folder, shape, steps=3):
    """Median seconds of the updates after the first, and MiB of this process's peak."""
    if label in OURS or "freed memory kept" in label:
        fast.keep_freed_memory()
    if label not in OURS:
        ends = their_updates(label, folder, *shape, steps + 1)
        return statistics.median(b - a for a, b in zip(ends, ends[1:])), peak_memory()
    settings = {"dtype": "float32", "rollout_dtype": "auto", "lora_rank": None, "micro_batch": None}
    args = argparse.Namespace(**settings | OURS[label], lr=1e-5, weight_decay=0.0)
    student = fast.save_memory(GPT.from_pretrained(folder))
    took = median_seconds(updater(args, student, *shape, torch.device("cpu")), steps)
    return took, peak_memory()


def their_updates(label, folder, B, P, C, steps):
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


def table(rollouts, updates):
    """Of rollouts {dtype: [theirs, ours]} in seconds, and updates {label: [seconds, MiB]}."""
    lines = ["| | transformers / TRL | ours | ours / theirs |", "|---|---:|---:|---:|"]
    B, P, C = ROLLOUT
    for dtype, (theirs, ours) in rollouts.items():
        cells = f"{B * C / theirs:,.0f} | {B * C / ours:,.0f} | {theirs / ours:.2f}"
        lines.append(f"| rollout {B} × ({P} + {C}), {dtype}, tokens/s | {cells} |")
    B, P, C = UPDATE
    for i, what in enumerate([f"update {B} × ({P} + {C}), s", "peak memory of it, MiB"]):
        for pair in COMPARED:
            theirs, ours = (updates[label][i] for label in pair)
            cells = " | ".join(f"{x:,.0f}" if i else f"{x:,.2f}" for x in (theirs, ours))
            lines.append(f"| {what}: {', '.join(pair)} | {cells} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def bench_peers(student):
    os.environ |= QUIET
    updates, rollouts = dict.fromkeys(label for pair in COMPARED for label in pair), {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_model(student, folder)
        for label in updates:
            print(f"update, {label}", file=sys.stderr)
            updates[label] = in_a_process(update, label, folder, UPDATE)
        for dtype in ("float32", "bfloat16"):
            print(f"rollout, {dtype}", file=sys.stderr)
            rollouts[dtype] = rollout_seconds(folder, getattr(torch, dtype))
    print(f"{machine(*PACKAGES)}\n\n{table(rollouts, updates)}", flush=True)


# --- The command ----------------------------------------------------------------------------------


def main(argv=None):
    raw, dtypes = argparse.RawDescriptionHelpFormatter, ("auto", "float32", "bfloat16")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("--peers", action="store_true", help="compare with transformers and TRL")
    p.add_argument("--init_from", default="gpt2", help="a size by its name, or a checkpoint folder")
    p.add_argument("--batch_size", type=int, default=8, help="rows (default: 8)")
    p.add_argument("--max_new_tokens", type=int, default=64, help="tokens per row (default: 64)")
    p.add_argument("--dtype", choices=dtypes, default="auto", help="as of gpt2.train")
    p.add_argument("--rollout_dtype", choices=dtypes, default="auto", help="as of gpt2.train")
    p.add_argument("--device", help="cpu, cuda or mps (default: the best available)")
    p.set_defaults(lr=1e-5, weight_decay=0.0, lora_rank=None, micro_batch=None)
    args = p.parse_args(argv)
    try:
        torch.manual_seed(0)
        if args.init_from in GPT2_SIZES:
            student = GPT(GPTConfig(1024, 50257, *GPT2_SIZES[args.init_from]))
        else:
            student = checkpoint.load_model(args.init_from)
        if args.peers:
            return bench_peers(student)
        fast.keep_freed_memory()
        device = train.pick_device(args.device)
        bench_update(args, fast.save_memory(student.to(device)), device)
    except ImportError as e:
        command = " ".join(f"{package}=={version}" for package, version in PACKAGES.items())
        sys.exit(f"error: --peers needs {e.name}: pip install {command}")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
