"""What an SDFT update costs on this machine, and how close each phase comes to its limits.

    python -m gpt2.bench             # every phase of an update of GPT-2, with random weights
    python -m gpt2.bench --tricks    # what each trick of gpt2/fast.py gains
    python -m gpt2.bench --peers     # transformers' generate and TRL's trainer beside ours

Times are medians of several runs after one that does not count. Two limits are measured in the same
run: the bandwidth, by summing a large array, and the rate of arithmetic, by multiplying two large
matrices. A phase's "% of roofline" is the time that its reading or its arithmetic alone would take
at these limits, whichever is longer, divided by the time that the phase takes.
"""

import argparse
import copy
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from gpt2 import checkpoint, fast, peers, settings
from model import GPT, GPT2_SIZES, GPTConfig
from sdft import clip_and_step, ema_update, sdft_loss

PROMPT, TEACHER_PROMPT = 64, 128  # tokens
CPU = torch.device("cpu")


def median_seconds(f, device, repeats=5):
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        f()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def limits(device, dtype):
    """Bytes read per second, and operations per second of a matrix product in dtype."""
    n = 2048 if device.type == "cpu" else 8192
    x, a = torch.ones(2**27, device=device), torch.ones(n, n, device=device, dtype=dtype)
    with torch.autocast(device.type, enabled=False):
        seconds = median_seconds(x.sum, device), median_seconds(lambda: a @ a, device)
    return 4 * len(x) / seconds[0], 2 * n**3 / seconds[1]


def memory(field, device=CPU):
    """Bytes of this process: "VmHWM" is the peak, "VmRSS" now. On a GPU the peak allocated there.

    None on a CPU without Linux's /proc; getrusage's peak would count the parent process too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])


# --- An update of GPT-2 ---------------------------------------------------------------------------


def bench_update(args, student, device):
    """Print the table for args.batch_size rows of args.max_new_tokens tokens."""
    B, C, V = args.batch_size, args.max_new_tokens, student.config.vocab_size
    dtype = settings.compute_dtype(args.dtype, device)
    rollout_dtype = settings.rollout_dtype(args, device)
    rollout_model = fast.RolloutGPT.of(student, rollout_dtype)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = settings.make_optimizer(student, args)
    weights = sum(p.numel() for p in student.parameters())
    blocks, head = sum(p.numel() for p in student.h.parameters()), V * student.config.n_embd
    bandwidth, rate = limits(device, dtype)
    rollout_rate = rate if rollout_dtype == dtype else limits(device, rollout_dtype)[1]
    rates = {name(rollout_dtype): rollout_rate, name(dtype): rate}
    rates = ", ".join(f"{ops / 1e9:.0f} GFLOP/s in {dtype}" for dtype, ops in rates.items())
    print(
        f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"{weights / 1e6:.0f}M parameters, arithmetic in {name(dtype)}, rollout in "
        f"{name(rollout_dtype)}\nbatch {B}, prompt {PROMPT}, teacher's prompt {TEACHER_PROMPT}, "
        f"completion {C} tokens\nlimits: {bandwidth / 1e9:.1f} GB/s, {rates}\n",
        flush=True,
    )
    prompts, teacher_prompts = (
        [torch.randint(V, (n,)).tolist() for _ in range(B)] for n in (PROMPT, TEACHER_PROMPT)
    )
    generators = fast.row_generators(0, 0, range(B), device)

    def roll_out(n):  # No token is -1, so that every row has n tokens.
        with torch.autocast(device.type, enabled=False):
            return fast.rollout(rollout_model, prompts, n, -1, 1.0, generators)

    def products(positions, heads, rate, passes=1):
        """Seconds of the matrix products: 2 operations per weight, position and pass."""
        return passes * 2 * (positions * blocks + heads * head) / rate

    completions, mask = roll_out(C)
    rollout_bytes = weights * rollout_dtype.itemsize
    step_best = max(products(B, B, rollout_rate), rollout_bytes / bandwidth)
    best = products(B * PROMPT, B, rollout_rate) + (C - 1) * step_best
    rollout_seconds = median_seconds(lambda: roll_out(C), device, 3)
    rows = [("rollout", rollout_seconds, best)]

    @torch.no_grad()
    def teacher_scores():
        return fast.completion_hidden(teacher, teacher_prompts, completions)

    teacher_hidden, teacher_head = teacher_scores(), teacher.wte.weight
    best = products(B * (TEACHER_PROMPT + C), 0, rate)
    rows += [("teacher's scoring", median_seconds(teacher_scores, device), best)]

    def student_scores():
        hidden = fast.completion_hidden(student, prompts, completions)
        heads = hidden, student.wte.weight, teacher_hidden, teacher_head
        fast.chunked_sdft_loss(*heads, mask, args.divergence)[0].backward()

    # One pass forward and two backward, and the teacher's logits.
    best = products(B * (PROMPT + C), B * C, rate, 3) + products(0, B * C, rate)
    rows += [("student's scoring, loss, backward", median_seconds(student_scores, device), best)]
    grads = [p.grad for p in student.parameters()]

    def optimizer_step():
        clip_and_step(student, optimizer, 0.0)
        for p, grad in zip(student.parameters(), grads):
            p.grad = grad  # for the next time

    # Clipping reads and writes the gradient. AdamW reads weight, gradient and two moments, and
    # writes all but the gradient.
    best = 4 * weights * 9 / bandwidth
    rows += [("clipping, AdamW", median_seconds(optimizer_step, device), best)]

    def average():
        ema_update(teacher, student, 0.02)

    rows += [("EMA", median_seconds(average, device), 4 * weights * 3 / bandwidth)]

    def whole():
        models = student, teacher, optimizer, prompts, teacher_prompts, C, -1
        how = dict(rollout_dtype=rollout_dtype, generators=generators, divergence=args.divergence)
        fast.train_step(*models, **how)

    best = sum(best for *_, best in rows)
    rows += [("the whole update", median_seconds(whole, device, 3), best)]
    print("| phase | ms | % of roofline |\n|---|---:|---:|")
    for phase, seconds, best in rows:
        print(f"| {phase} | {1e3 * seconds:,.0f} | {best / seconds:.0%} |")
    speed = rollout_bytes * C / rollout_seconds / 1e9
    print(f"\nrollout: {B * C / rollout_seconds:.0f} tokens/s, {speed:.1f} GB/s of weights read")
    if peak := memory("VmHWM", device):
        print(f"peak memory: {peak / 2**20:,.0f} MiB")
    long = min(512, student.config.block_size - PROMPT)
    short, end = (median_seconds(lambda: roll_out(n), device, 1) / n for n in (32, long))
    print(f"a token of {long} costs {end / short:.2f} times one of 32 (one run each)", flush=True)


def name(dtype):
    return str(dtype).removeprefix("torch.")


# --- What each trick gains ------------------------------------------------------------------------


def tricks():
    """Rows (what, plain, fast) in ms, for GPT-2's size and 8 rows on a CPU."""

    def ms(f, repeats=30):
        return 1e3 * median_seconds(f, CPU, repeats)

    V, D = 50257, 768
    x, p = torch.randn(8, D), torch.randn(8, V).softmax(-1)
    lm_head, c_attn = [torch.randn(V, D)], [torch.randn(3 * D, D) for _ in range(12)]
    with torch.no_grad():
        for what, layers in (("logits", lm_head), ("queries, keys and values", c_attn)):
            for dtype in (torch.float32, torch.bfloat16):
                if not fast.PackedLinear.can_hold(layers[0].to(dtype)):
                    continue
                inputs, weights = x.to(dtype), [w.to(dtype) for w in layers]
                packed = [fast.PackedLinear(w) for w in weights]
                plain = ms(lambda: [F.linear(inputs, w) for w in weights])
                few = ms(lambda: [linear(inputs) for linear in packed])
                yield f"a step's {what} in {name(dtype)}: F.linear, or packed", plain, few
        q, kv = torch.randn(8, 12, 1, 64), torch.randn(2, 8, 12, 128, 64)
        half = q.bfloat16(), *kv.bfloat16()
        plain = ms(lambda: F.scaled_dot_product_attention(*half))
        few = ms(lambda: F.scaled_dot_product_attention(q, *kv))
        yield "a step's attention to 128 keys: bfloat16, or float32", plain, few
        streams = fast.row_generators(0, 0, range(8), CPU)
        rows = list(zip(p, streams))
        plain = ms(lambda: [torch.multinomial(row, 1, generator=g) for row, g in rows])
        few = ms(lambda: fast.inverse_cdf(p, torch.rand(8)))
        yield "a token for 8 rows: torch.multinomial, or inverse CDF", plain, few
    student = GPT(GPTConfig())
    for w in student.parameters():
        w.grad = torch.randn_like(w)
    plain, fused = (
        ms(torch.optim.AdamW(student.parameters(), lr=1e-5, fused=fused).step, 5)
        for fused in (False, True)
    )
    yield "AdamW: plain, or fused", plain, fused


def loss_memory(chunk):
    """Bytes that loss and backward of 2,048 tokens add to the peak; chunk 0: `sdft.sdft_loss`."""
    V, D, shape = 50257, 768, (16, 128)
    hidden, teacher_hidden = torch.randn(*shape, D, requires_grad=True), torch.randn(*shape, D)
    heads = [torch.randn(V, D).mul_(0.02) for _ in range(2)]
    heads[0].requires_grad_()
    before, mask = memory("VmRSS"), torch.ones(shape)
    if chunk:
        loss, _ = fast.chunked_sdft_loss(
            hidden, heads[0], teacher_hidden, heads[1], mask, chunk=chunk
        )
    else:
        loss, _ = sdft_loss(F.linear(hidden, heads[0]), F.linear(teacher_hidden, heads[1]), mask)
    loss.backward()
    return memory("VmHWM") - before


def new_tensor(keep):
    """Milliseconds to fill a new tensor of 64 MiB, after others of that size were freed."""
    if keep:
        fast.keep_freed_memory()
    return 1e3 * median_seconds(lambda: torch.ones(2**24), CPU, 30)


def in_a_process(call):
    """What a function of this file returns in a process of its own, whose peak starts afresh."""
    code = f"from gpt2 import bench; print(bench.{call})"
    run = [sys.executable, "-c", code]
    return float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


def bench_tricks():
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| plain, or fast | plain | fast |\n|---|---:|---:|")
    for what, plain, quick in tricks():
        print(f"| {what} | {plain:.2f} ms | {quick:.2f} ms |", flush=True)
    plain, quick = (in_a_process(f"new_tensor({keep})") for keep in (False, True))
    what = "a new tensor of 64 MiB: freed memory given back, or kept"
    print(f"| {what} | {plain:.2f} ms | {quick:.2f} ms |", flush=True)
    if memory("VmHWM"):
        plain, quick = (in_a_process(f"loss_memory({n})") / 2**20 for n in (0, fast.CHUNK))
        what = f"peak of loss and backward, 2,048 tokens: all logits, or {fast.CHUNK} at a time"
        print(f"| {what} | {plain:,.0f} MiB | {quick:,.0f} MiB |", flush=True)


# --- The command ----------------------------------------------------------------------------------


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("--tricks", action="store_true", help="measure what each trick gains, and stop")
    p.add_argument(
        "--peers", action="store_true", help="transformers and TRL beside ours, and stop"
    )
    p.add_argument(
        "--shapes",
        nargs="+",
        metavar="BxP+C",
        default=["4x32+128", "8x64+64", "16x128+128"],
        help="rollouts of --peers: rows, tokens of the prompt and of the response",
    )
    p.add_argument(
        "--update_shape", metavar="BxP+C", default="8x32+32", help="update of --peers, likewise"
    )
    p.add_argument("--rounds", type=int, default=2, help="of --peers, for medians (default: 2)")
    p.add_argument("--quick", action="store_true", help="--peers on a model of toy size")
    p.add_argument("--init_from", default="gpt2", help="a size by its name, or a checkpoint folder")
    p.add_argument("--batch_size", type=int, default=8, help="rows (default: 8)")
    p.add_argument("--max_new_tokens", type=int, default=64, help="tokens per row (default: 64)")
    for flag in ("divergence", "dtype", "rollout_dtype"):
        choices, text = settings.CHOICES[flag]
        p.add_argument(f"--{flag}", choices=choices, default=choices[0], help=text)
    p.add_argument("--device", help=settings.TEXTS["device"][1])
    p.set_defaults(lr=1e-5, weight_decay=0.0)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.tricks:
            return bench_tricks()
        if args.peers:
            return peers.bench_peers(args)
        fast.keep_freed_memory()
        device = settings.pick_device(args.device)
        if args.init_from in GPT2_SIZES:
            torch.manual_seed(0)
            student = GPT(GPTConfig(1024, 50257, *GPT2_SIZES[args.init_from]))
        else:
            student = checkpoint.load_model(args.init_from)
        if TEACHER_PROMPT + args.max_new_tokens > student.config.block_size:
            raise ValueError(
                f"--max_new_tokens {args.max_new_tokens} and a prompt of {TEACHER_PROMPT} do not "
                f"fit block_size {student.config.block_size}; lower it"
            )
        with settings.autocast(args, device):
            bench_update(args, fast.lean(student.to(device)), device)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
