"""What an SDFT update of GPT-2 costs on this machine, with random weights.

    python -m gpt2.bench             # every phase of an update, beside the machine's limits
    python -m gpt2.bench --peers     # transformers' generate and TRL's trainer beside ours

Times are medians of several runs after one that does not count. A phase's "% of roofline" is the
time that its reading or its arithmetic alone would take at this machine's limits, whichever is
longer, divided by the time that the phase takes. The limits are measured in the same run, by
summing a large array and by multiplying two large matrices.

Beside the peers every response has its full length, and every update runs in a process of its own,
whose peak memory is then its own. Our updates keep freed memory, as gpt2.train does; TRL's are
shown without and with that.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpt2 import checkpoint, fast, lora, train
from model import GPT, GPT2_SIZES, GPTConfig
from sdft import clip_and_step, ema_update

NO_END = -1  # in place of an end token: every response has its full length
PACKAGES = {"transformers": "5.24.0", "trl": "1.16.0"}
OURS = {  # label: settings of gpt2.train
    "ours float32": {},
    "ours float32, rollout in bfloat16": {"rollout_dtype": "bfloat16"},
    "ours bfloat16": {"dtype": "bfloat16"},
    "ours float32, --lora_rank 16": {"lora_rank": 16},
    "ours float32, --lora_rank 16 --micro_batch 2": {"lora_rank": 16, "micro_batch": 2},
}
COMPARED = [("TRL as it comes" if "ours b" in ours else "TRL float32", ours) for ours in OURS]
COMPARED += [("TRL float32, freed memory kept", "ours float32")]
COMPARED += [("TRL as it comes, freed memory kept", "ours bfloat16")]
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


def seconds(f):
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(f, repeats=5):
    return statistics.median([seconds(f) for _ in range(repeats + 1)][1:])


def memory(field):
    """MiB of this process: "VmHWM" is the peak, "VmRSS" now. None without Linux's /proc.

    The peak that getrusage knows would count the parent process too.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1]) / 1024


def in_a_process(call):
    """What a function of this file returns in a process of its own, whose peak starts afresh."""
    code = f"import json; from gpt2 import bench; print('\\n' + json.dumps(bench.{call}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"{call} ended with: {run.stderr.splitlines()[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def name(dtype):
    return str(dtype).removeprefix("torch.")


def random_prompts(vocab_size, *shape):
    return torch.randint(vocab_size, shape).tolist()


def machine(*packages):
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    cpu = f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return ", ".join([cpu, f"torch {torch.__version__}", *versions])


# --- The phases of an update ----------------------------------------------------------------------


def limits(device, dtype):
    """Bytes read per second, and operations per second of a matrix product in dtype."""
    n = 2048 if device.type == "cpu" else 8192
    x, a = torch.ones(2**27, device=device), torch.ones(n, n, device=device, dtype=dtype)
    return 4 * len(x) / median_seconds(x.sum), 2 * n**3 / median_seconds(lambda: a @ a)


def bench_update(args, student, device):
    """Print the table for args.batch_size rows, and responses of args.max_new_tokens tokens."""
    B, P, C = args.batch_size, args.prompt, args.max_new_tokens
    dtype = train.compute_dtype(args.dtype, device)
    rollout_dtype = train.rollout_dtype(args, device)
    (bandwidth, rate), (_, rollout_rate) = (limits(device, d) for d in (dtype, rollout_dtype))
    weights = sum(p.numel() for p in student.parameters())
    blocks, head = sum(p.numel() for p in student.h.parameters()), student.wte.weight.numel()
    print(
        f"device {device}, {machine()}\n"
        f"{weights / 1e6:.0f}M parameters, arithmetic in {name(dtype)}, rollout in "
        f"{name(rollout_dtype)}\nbatch {B}, prompt {P}, teacher's prompt {2 * P}, completion {C} "
        f"tokens\nlimits: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s, "
        f"{rollout_rate / 1e9:.0f} in rollouts\n\n| phase | ms | % of roofline |\n|---|---:|---:|",
        flush=True,
    )
    roles = student, copy.deepcopy(student).requires_grad_(False)
    optimizer = train.make_optimizer(student, args)
    contexts = [random_prompts(student.config.vocab_size, B, n) for n in (P, 2 * P)]
    generators = fast.row_generators(0, 0, range(B), device)
    rollout_model = fast.RolloutGPT.of(student, rollout_dtype)
    gradients = [torch.full_like(p, 1e-3) for p in student.parameters()]

    def roll_out():
        return fast.rollout(rollout_model, contexts[0], C, NO_END, 1.0, generators)

    def scoring():
        with train.autocast(args, device):
            fast.distill_backward(*roles, *contexts, completions, mask, args.divergence)

    def optimizer_step():
        for p, gradient in zip(student.parameters(), gradients):
            p.grad = gradient
        clip_and_step(student, optimizer, 0.0)

    def update():
        options = {"rollout_dtype": rollout_dtype, "divergence": args.divergence}
        options["generators"] = generators
        with train.autocast(args, device):
            fast.train_step(*roles, optimizer, *contexts, C, NO_END, **options)

    def products(positions, heads, rate, passes=1):
        """Seconds of the matrix products: 2 operations per weight, position and pass."""
        return passes * 2 * (positions * blocks + heads * head) / rate

    completions, mask = roll_out()
    reading = weights * rollout_dtype.itemsize / bandwidth  # of all weights once, per token
    rollout = products(B * P, B, rollout_rate)
    rollout += (C - 1) * max(products(B, B, rollout_rate), reading)
    # The student's pass forward and two backward, and the teacher's one.
    scored = products(B * (P + C), B * C, rate, passes=3) + products(B * (2 * P + C), B * C, rate)
    phases = {  # name: function, seconds at the limits
        "rollout": (roll_out, rollout),
        "scoring, loss, backward": (scoring, scored),
        # Clipping reads and writes the gradient. AdamW reads weight, gradient and two moments, and
        # writes all but the gradient.
        "clipping, AdamW": (optimizer_step, 4 * weights * 9 / bandwidth),
        "EMA": (lambda: ema_update(*roles[::-1], 0.02), 4 * weights * 3 / bandwidth),
    }
    phases["the whole update"] = update, sum(best for _, best in phases.values())
    took = {}
    for phase, (function, best) in phases.items():
        took[phase] = median_seconds(function, 3)
        print(f"| {phase} | {1e3 * took[phase]:,.0f} | {best / took[phase]:.0%} |", flush=True)
    print(
        f"\nrollout: {B * C / took['rollout']:.0f} tokens/s, "
        f"{bandwidth * reading * C / took['rollout'] / 1e9:.1f} GB/s of weights read"
    )
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory("VmHWM")
    if peak:
        print(f"peak memory: {peak:,.0f} MiB")


# --- Beside transformers and TRL ------------------------------------------------------------------


def shape(text):
    """ "8x64+32" is 8 rows, prompts of 64 tokens and responses of 32."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
    if not match:
        raise ValueError(f"{text!r} is no shape; write ROWSxPROMPT+RESPONSE, such as 8x64+64")
    return tuple(map(int, match.groups()))


@torch.no_grad()
def rollout_seconds(folder, B, P, C, dtype, rounds):
    """Of transformers' generate and of ours, in turn; medians of the rounds."""
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None
    student = GPT.from_pretrained(folder)
    ours = fast.RolloutGPT.of(student, dtype)
    prompts = torch.randint(student.config.vocab_size, (B, P))

    def generate(n):
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": n, "pad_token_id": 0}
        theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    def roll_out(n):
        generators = fast.row_generators(0, 0, range(B), "cpu")
        fast.rollout(ours, prompts.tolist(), n, NO_END, 1.0, generators)

    for f in (generate, roll_out):
        f(4)  # does not count
    times = [[seconds(lambda: f(C)) for f in (generate, roll_out)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


def update(label, folder, B, P, C, steps):
    """Median seconds of the updates after the first, and MiB of this process's peak or None."""
    if label in OURS or "freed memory kept" in label:
        fast.keep_freed_memory()
    updates = our_updates if label in OURS else their_updates
    ends = updates(label, folder, B, P, C, steps + 1)
    return statistics.median(b - a for a, b in zip(ends, ends[1:])), memory("VmHWM")


def our_updates(label, folder, B, P, C, steps):
    """The time at the end of each update."""
    settings = {"dtype": "float32", "rollout_dtype": "auto", "lora_rank": None, "micro_batch": None}
    args = argparse.Namespace(**settings | OURS[label], lr=1e-5, weight_decay=0.0)
    cpu, ends = torch.device("cpu"), []
    options = {"rollout_dtype": train.rollout_dtype(args, cpu), "micro_batch": args.micro_batch}
    student = fast.lean(GPT.from_pretrained(folder))
    if args.lora_rank:
        student = lora.add_adapters(student, args.lora_rank, alpha=16.0)
    teacher = lora.share(student).requires_grad_(False)
    roles = student, teacher, train.make_optimizer(student, args)
    for step in range(steps):
        contexts = random_prompts(100, B, P), random_prompts(100, B, 2 * P)
        options["generators"] = fast.row_generators(0, step, range(B), cpu)
        with train.autocast(args, cpu):
            fast.train_step(*roles, *contexts, C, NO_END, **options)
        ends.append(time.perf_counter())
    return ends


def their_updates(label, folder, B, P, C, steps):
    """The time at the end of each update of TRL's trainer."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(98))]  # a token per word
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    texts = [" ".join(f"w{i}" for i in row) for row in random_prompts(98, 2 * steps * B, P)]
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
    SDFTTrainer(model=folder, args=args, callbacks=[Clock()], **data).train()
    return ends


def table(rollouts, updates, update_shape):
    """Of rollouts {(shape, dtype): [theirs, ours]} in seconds, and updates {label: [s, MiB]}."""
    lines = ["| | transformers / TRL | ours | ours / theirs |", "|---|---:|---:|---:|"]
    for (text, dtype), (theirs, ours) in rollouts.items():
        B, P, C = shape(text)
        rates = f"{B * C / theirs:,.0f} | {B * C / ours:,.0f} | {theirs / ours:.2f}"
        lines.append(f"| rollout {B} × ({P} + {C}), {name(dtype)}, tokens/s | {rates} |")
    B, P, C = shape(update_shape)
    for i, what in enumerate([f"update {B} × ({P} + {C}), s", "peak memory of it, MiB"]):
        for pair in COMPARED:
            theirs, ours = (updates[label][i] for label in pair)
            if theirs is not None:  # there is no peak without Linux's /proc
                cells = " | ".join(f"{x:,.0f}" if i else f"{x:,.2f}" for x in (theirs, ours))
                lines.append(f"| {what}: {', '.join(pair)} | {cells} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def bench_peers(args):
    if missing := [package for package in PACKAGES if not importlib.util.find_spec(package)]:
        command = " ".join(f"{package}=={version}" for package, version in PACKAGES.items())
        raise ValueError(f"--peers needs {' and '.join(missing)}: pip install {command}")
    os.environ |= QUIET
    B, P, C = shape(args.update_shape)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 128} if args.quick else {}
    config, steps = GPTConfig(**sizes), 1 if args.quick else 3
    longest = max(2 * P + C, *(p + c for _, p, c in map(shape, args.shapes)))
    if longest > config.block_size:
        raise ValueError(f"a shape needs {longest} tokens, and GPT-2 has {config.block_size}")
    seen, rollouts = {label: [] for pair in COMPARED for label in pair}, {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        checkpoint.save_model(GPT(config), folder)
        for n in range(args.rounds):
            for label, runs in seen.items():
                print(f"round {n + 1} of {args.rounds}: update, {label}", file=sys.stderr)
                runs.append(in_a_process(f"update{label, folder, B, P, C, steps}"))
        for dtype in (torch.float32, torch.bfloat16):
            for text in args.shapes:
                print(f"rollout {text}, {name(dtype)}", file=sys.stderr)
                rollouts[text, dtype] = rollout_seconds(folder, *shape(text), dtype, args.rounds)
    updates = {
        label: [None if None in column else statistics.median(column) for column in zip(*runs)]
        for label, runs in seen.items()
    }
    print(f"{machine(*PACKAGES)}\n\n{table(rollouts, updates, args.update_shape)}", flush=True)


# --- The command ----------------------------------------------------------------------------------


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("--peers", action="store_true", help="compare with transformers and TRL")
    p.add_argument("--shapes", nargs="+", metavar="BxP+C", help="of rollouts beside the peers")
    p.add_argument("--update_shape", metavar="BxP+C", help="of an update beside the peers")
    p.add_argument("--rounds", type=int, default=2, help="of --peers, for medians (default: 2)")
    p.add_argument("--quick", action="store_true", help="--peers on a model of toy size")
    p.add_argument("--init_from", default="gpt2", help="a size by its name, or a checkpoint folder")
    p.add_argument("--batch_size", type=int, default=8, help="rows (default: 8)")
    p.add_argument("--max_new_tokens", type=int, default=64, help="tokens per row (default: 64)")
    p.add_argument("--divergence", choices=("reverse", "forward", "jsd"), default="reverse")
    dtypes = ("auto", "float32", "bfloat16")
    p.add_argument("--dtype", choices=dtypes, default="auto", help="as of gpt2.train")
    p.add_argument("--rollout_dtype", choices=dtypes, default="auto", help="as of gpt2.train")
    p.add_argument("--device", help="cpu, cuda or mps (default: the best available)")
    p.set_defaults(lr=1e-5, weight_decay=0.0, prompt=64)
    args = p.parse_args(argv)
    usual = ["2x4+4"] if args.quick else ["4x32+128", "8x64+64", "16x128+128"]
    args.shapes = args.shapes or usual
    args.update_shape = args.update_shape or ("2x4+4" if args.quick else "8x32+32")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.peers:
            return bench_peers(args)
        fast.keep_freed_memory()
        device = train.pick_device(args.device)
        if args.init_from in GPT2_SIZES:
            torch.manual_seed(0)
            student = GPT(GPTConfig(1024, 50257, *GPT2_SIZES[args.init_from]))
        else:
            student = checkpoint.load_model(args.init_from)
        if 2 * args.prompt + args.max_new_tokens > student.config.block_size:
            raise ValueError(
                f"--max_new_tokens {args.max_new_tokens} and a prompt of {2 * args.prompt} do not "
                f"fit block_size {student.config.block_size}; lower it"
            )
        bench_update(args, fast.lean(student.to(device)), device)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
