"""transformers' generate and TRL's SDFT trainer beside this project: python -m gpt2.bench --peers

Weights are random, prompts are random words, and every response has its full length. The rollouts
run in turn in one process, every update in a process of its own, whose peak memory is then its own.
All numbers are medians over the rounds. Our updates keep freed memory, as gpt2.train does; TRL's
are shown without and with that.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpt2 import checkpoint, fast, lora, settings
from model import GPT, GPTConfig

PACKAGES = ("transformers", "trl")
COMMAND = "pip install transformers==5.24.0 trl==1.16.0"
# Nothing is looked up in the network, and nothing else is printed.
QUIET = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
OURS = {  # name: flags
    "float32": [],
    "float32, rollout in bfloat16": ["--rollout_dtype", "bfloat16"],
    "bfloat16": ["--dtype", "bfloat16"],
    "float32, --lora_rank 16": ["--lora_rank", "16"],
    "float32, --lora_rank 16 --micro_batch 2": ["--lora_rank", "16", "--micro_batch", "2"],
}
THEIRS = {  # name: TRL's settings
    "float32": {"bf16": False, "gradient_checkpointing": False},
    "as it comes": {},  # autocast to bfloat16, and checkpointing of activations
}
KEPT = ", freed memory kept"  # after a name: as `fast.keep_freed_memory` keeps ours
COMPARED = [
    ("as it comes" if "--dtype" in flags else "float32", name) for name, flags in OURS.items()
]
COMPARED += [("float32" + KEPT, "float32"), ("as it comes" + KEPT, "bfloat16")]


def missing():
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def shape(text):
    """ "8x64+32" is 8 rows, prompts of 64 tokens and responses of 32."""
    match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
    if not match or min(map(int, match.groups())) < 1:
        raise ValueError(f"{text!r} is no shape; write ROWSxPROMPT+RESPONSE, such as 8x64+64")
    return tuple(map(int, match.groups()))


# --- Rollouts -------------------------------------------------------------------------------------


@torch.no_grad()
def rollouts(folder, shapes, rounds, say):
    """{(shape, dtype): [their seconds, our seconds]}, medians of the rounds."""
    from transformers import GPT2LMHeadModel

    student, out = checkpoint.load_model(str(folder)), {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
        theirs.generation_config.eos_token_id = None
        ours = fast.RolloutGPT.of(student, dtype)
        for text in shapes:
            B, P, C = shape(text)
            prompts = torch.randint(student.config.vocab_size, (B, P))

            def generate(n, prompts=prompts, theirs=theirs):
                how = {"do_sample": True, "top_k": 0, "max_new_tokens": n, "pad_token_id": 0}
                theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **how)

            def roll_out(n, prompts=prompts, ours=ours):  # no token is -1
                generators = fast.row_generators(0, 0, range(len(prompts)), "cpu")
                fast.rollout(ours, prompts.tolist(), n, -1, 1.0, generators)

            seconds = [[], []]
            for f in (generate, roll_out):
                f(4)  # warm-up
            for _ in range(rounds):
                for f, times in zip((generate, roll_out), seconds):
                    start = time.perf_counter()
                    f(C)
                    times.append(time.perf_counter() - start)
            out[text, dtype] = [statistics.median(times) for times in seconds]
            say(f"rollout {text}, {dtype}")
    return out


# --- Updates --------------------------------------------------------------------------------------


def our_updates(folder, flags, text, steps):
    """Seconds of each update after the first."""
    B, P, C = shape(text)
    args, _ = settings.parse_args("", ["--out_dir", "unused", *flags])
    cpu = torch.device("cpu")
    fast.keep_freed_memory()
    student = fast.lean(checkpoint.load_model(str(folder)))
    if args.lora_rank:
        student = lora.add_adapters(student, args.lora_rank, args.lora_alpha)
    teacher = lora.share(student).requires_grad_(False)
    optimizer = settings.make_optimizer(student, args)
    ends = []
    for step in range(steps + 1):
        prompts, teacher_prompts = (torch.randint(100, (B, n)).tolist() for n in (P, 2 * P))
        with settings.autocast(args, cpu):
            fast.train_step(
                student,
                teacher,
                optimizer,
                prompts,
                teacher_prompts,
                C,
                -1,
                generators=fast.row_generators(0, step, range(B), cpu),
                rollout_dtype=settings.rollout_dtype(args, cpu),
                micro_batch=args.micro_batch,
            )
        ends.append(time.perf_counter())
    return [b - a for a, b in zip(ends, ends[1:])]


def their_updates(folder, name, text, steps):
    """Seconds of each update of TRL's trainer after the first, with the settings of ours."""
    if name.endswith(KEPT):
        fast.keep_freed_memory()
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    B, P, C = shape(text)
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(98))]  # a token per word
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    def sentence():
        return " ".join(words[i] for i in torch.randint(2, 100, (P,)).tolist())

    rows = [
        {"prompt": sentence(), "privileged_context": sentence()} for _ in range((steps + 1) * B)
    ]
    args = SDFTConfig(
        output_dir=str(Path(folder) / "trl"),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        max_steps=steps + 1,
        per_device_train_batch_size=B,
        gradient_accumulation_steps=1,
        learning_rate=1e-5,
        num_generations=1,
        max_completion_length=C,
        max_prompt_length=None,
        teacher_model_kind="ema",
        teacher_update_rate=0.02,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        **THEIRS[name.removesuffix(KEPT)],
    )
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    dataset, how = Dataset.from_list(rows), {"processing_class": tokenizer, "callbacks": [Clock()]}
    SDFTTrainer(model=str(folder), args=args, train_dataset=dataset, **how).train()
    return [b - a for a, b in zip(ends, ends[1:])]


def update_in_a_process(function, *arguments):
    """Median seconds, and MiB of peak memory or None, of `our_updates` or `their_updates`."""
    code = (
        "import json; from gpt2 import bench, peers\n"
        f"seconds = peers.{function}(*{arguments!r})\n"
        "print('\\n' + json.dumps([seconds, bench.memory('VmHWM')]))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    if run.returncode:
        raise ValueError(f"{function}{arguments} ended with: {run.stderr.splitlines()[-1]}")
    seconds, peak = json.loads(run.stdout.splitlines()[-1])
    return statistics.median(seconds), peak and peak / 2**20


def updates(folder, text, rounds, steps, say):
    """{(is ours, name): (seconds, MiB)}, medians of the rounds."""
    jobs = {(False, name): ("their_updates", name) for name, _ in COMPARED}
    jobs |= {(True, name): ("our_updates", OURS[name]) for _, name in COMPARED}
    seen = {job: [] for job in jobs}
    for n in range(rounds):
        for job, (function, more) in jobs.items():
            seen[job].append(update_in_a_process(function, str(folder), more, text, steps))
            say(f"round {n + 1} of {rounds}: update, {'ours' if job[0] else 'TRL'}, {job[1]}")
    return {
        job: [statistics.median(v) if None not in v else None for v in zip(*values)]
        for job, values in seen.items()
    }


# --- The table ------------------------------------------------------------------------------------


def processor():
    """The name of the processor, and the instructions for bfloat16 that it has."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return ", ".join([name[1] if name else platform.processor() or platform.machine(), *has])


def machine():
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *PACKAGES)]
    return ", ".join([processor(), f"{torch.get_num_threads()} threads", *versions])


def table(rolled, updated, text):
    lines = ["| | transformers / TRL | ours | ours / theirs |", "|---|---:|---:|---:|"]
    for (name, dtype), (theirs, ours) in rolled.items():
        B, P, C = shape(name)
        rates = f"{B * C / theirs:,.0f} | {B * C / ours:,.0f}"
        what = f"rollout {B} × ({P} + {C}), {str(dtype).removeprefix('torch.')}, tokens/s"
        lines.append(f"| {what} | {rates} | {theirs / ours:.2f} |")
    B, P, C = shape(text)
    for i, what in enumerate(["update {} × ({} + {}), s", "peak memory of it, MiB"]):
        for their_name, our_name in COMPARED:
            theirs, ours = updated[False, their_name][i], updated[True, our_name][i]
            if theirs is not None:  # there is no peak without Linux's /proc
                label = f"{what.format(B, P, C)}: TRL {their_name}, ours {our_name}"
                cells = " | ".join(f"{x:,.0f}" if i else f"{x:,.2f}" for x in (theirs, ours))
                lines.append(f"| {label} | {cells} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def bench_peers(args):
    if missing():
        raise ValueError(f"--peers needs {' and '.join(missing())}: {COMMAND}")
    os.environ |= QUIET
    shapes, text, rounds, steps = args.shapes, args.update_shape, args.rounds, 3
    sizes = {}
    if args.quick:
        shapes, text, rounds, steps = ["2x4+4"], "2x4+4", 1, 1
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 128}
    longest = max(P + C for _, P, C in map(shape, shapes))
    longest = max(longest, 2 * shape(text)[1] + shape(text)[2])
    config = GPTConfig(**sizes)
    if longest > config.block_size:
        raise ValueError(f"a shape needs {longest} tokens, and GPT-2 has {config.block_size}")
    start = time.perf_counter()

    def say(what):
        print(f"{time.perf_counter() - start:4.0f} s  {what}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        checkpoint.save_model(GPT(config), folder)
        updated = updates(folder, text, rounds, steps, say)
        rolled = rollouts(folder, shapes, rounds, say)
    print(f"{machine()}\n\n{table(rolled, updated, text)}", flush=True)
