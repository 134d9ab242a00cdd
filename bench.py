"""What an SDFT update costs on this machine, phase by phase, and how close each phase comes to what the machine can do.

    python train_gpt2.py --bench            # GPT-2's size, random weights; a few minutes on two cores
    python -m bench                         # the toy's update against its matrix products, and `import sdft` against `import torch`

Every time is the median of several runs after one that does not count. The limits are measured in the same run: the bandwidth by
summing a large array, the rate of arithmetic by multiplying two large matrices. A phase's share of them is the time
that its reading or its arithmetic alone would take there, whichever is longer, over the time that it takes.
"""

import copy
import multiprocessing
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from sdft import chunked_sdft_loss, completion_hidden, ema_update, rollout, sdft_loss, train_step, update

PROMPT, TEACHER_PROMPT = 64, 128  # tokens
LOSS_TOKENS = (16, 128)  # rows and completion tokens of the memory comparison


def median_seconds(f, device, repeats=5):
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        f()
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def limits(device, dtype):
    """Bytes per second of reading, and operations per second of a matrix product in dtype."""
    n = 2048 if device.type == "cpu" else 8192
    x, a = torch.ones(2**27, device=device), torch.ones(n, n, device=device, dtype=dtype)
    return 4 * len(x) / median_seconds(x.sum, device), 2 * n**3 / median_seconds(lambda: a @ a, device)


# --- An update of GPT-2 ---------------------------------------------------------------------------------------------


def bench(student, sampler, optimizer, chunk, args, autocast, device):
    """Prints the table. sampler: what rolls out; optimizer: over the student's weights; autocast(): the context of the passes."""
    B, C, V = args.batch_size, args.max_new_tokens, student.config.vocab_size
    dtype, rollout_dtype = torch.bfloat16 if autocast()._enabled else torch.float32, sampler.wte.weight.dtype
    print(
        f"device {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"{sum(p.numel() for p in student.parameters()) / 1e6:.0f}M parameters, arithmetic in {name(dtype)}, rollout in {name(rollout_dtype)}\n"
        f"batch {B}, prompt {PROMPT}, teacher's prompt {TEACHER_PROMPT}, completion {C} tokens\n",
        flush=True,
    )
    bandwidth, matmul = limits(device, dtype)
    rollout_matmul = matmul if rollout_dtype == dtype else limits(device, rollout_dtype)[1]
    print(f"limits: {bandwidth / 1e9:.1f} GB/s, {matmul / 1e9:.0f} GFLOP/s in {name(dtype)}, {rollout_matmul / 1e9:.0f} in {name(rollout_dtype)}\n")

    teacher = copy.deepcopy(student).requires_grad_(False)
    prompts, teacher_prompts = ([torch.randint(V, (n,)).tolist() for _ in range(B)] for n in (PROMPT, TEACHER_PROMPT))
    generators = [torch.Generator(device).manual_seed(b) for b in range(B)]
    say = lambda n: rollout(sampler, prompts, n, -1, generator=generators)  # no token is -1: every row has n tokens
    completions, mask = say(C)
    weights = sum(p.numel() for p in student.parameters())
    blocks, head = sum(p.numel() for p in student.h.parameters()), V * student.config.n_embd

    def floor(positions, heads, rate, passes=1):
        """Seconds of the matrix products alone: 2 operations per weight and position, and as many again per pass backward."""
        return passes * 2 * (positions * blocks + heads * head) / rate

    def backward():
        hidden = completion_hidden(student, prompts, completions)
        loss, _ = chunked_sdft_loss(hidden, student.wte.weight, scored, teacher.wte.weight, mask, args.kl, chunk=chunk)
        loss.backward()

    with autocast():
        step_bytes = weights * (2 if rollout_dtype == torch.bfloat16 else 4)
        t = {C: median_seconds(lambda: say(C), device, 3)}
        best = floor(B * PROMPT, B, rollout_matmul) + (C - 1) * max(floor(B, B, rollout_matmul), step_bytes / bandwidth)
        rows = [("rollout", t[C], best)]
        with torch.no_grad():
            scored = completion_hidden(teacher, teacher_prompts, completions)
            seconds = median_seconds(lambda: completion_hidden(teacher, teacher_prompts, completions), device)
        rows += [("teacher's scoring", seconds, floor(B * (TEACHER_PROMPT + C), 0, matmul))]
        # once forward and twice backward; the teacher's logits once more
        best = floor(B * (PROMPT + C), B * C, matmul, 3) + floor(0, B * C, matmul)
        rows += [("student's scoring, loss, backward", median_seconds(backward, device), best)]
        optimizer_bytes = 4 * weights * 7  # weight, gradient and two moments are read, all but the gradient written
        rows += [("AdamW, with clipping", median_seconds(lambda: step(student, optimizer), device), optimizer_bytes / bandwidth)]
        rows += [("EMA", median_seconds(lambda: ema_update(teacher, student, 0.02), device), 4 * weights * 3 / bandwidth)]
        whole = median_seconds(
            lambda: train_step(
                student, teacher, optimizer, prompts, teacher_prompts, C, -1, kl=args.kl, generator=generators,
                sampler=sampler if sampler is not student else None, chunk=chunk,
            ), device, 3,
        )  # fmt: skip
        rows += [("the whole update", whole, sum(best for *_, best in rows))]
        per_token = {n: median_seconds(lambda: say(n), device, 1) / n for n in (32, 512)}
    print("| phase | ms | share of the limit |\n|---|---:|---:|")
    for phase, seconds, best in rows:
        print(f"| {phase} | {1e3 * seconds:,.0f} | {best / seconds:.0%} |")
    print(f"\nrollout: {B * C / t[C]:.0f} tokens/s, {step_bytes * C / t[C] / 1e9:.1f} GB/s of weights read")
    print(f"a token of 512 costs {per_token[512] / per_token[32]:.2f} times one of 32")
    print(f"peak memory: {peak_bytes(device) / 2**20:,.0f} MiB")
    if device.type == "cpu":
        small, large = (in_a_process(loss_memory, V, student.config.n_embd, c) for c in (chunk, None))
        print(f"peak of loss and backward at {LOSS_TOKENS[0] * LOSS_TOKENS[1]:,} tokens: {small / large:.2f} of the plain formula's ({small / 2**20:,.0f} of {large / 2**20:,.0f} MiB)")


def name(dtype):
    return str(dtype).removeprefix("torch.")


def step(student, optimizer):
    """`update` at gradients that stay."""
    grads = [p.grad for p in student.parameters()]
    update(student, optimizer, 0.0)
    for p, grad in zip(student.parameters(), grads):
        p.grad = grad


def peak_bytes(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process(f, *args):
    """f(*args) in a process of its own: the peak of a process never falls again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(f, args)


def loss_memory(V, D, chunk):
    """What loss and backward add to the peak, in bytes; with chunk None the plain formula on full logits."""
    hidden, teacher_hidden = torch.randn(*LOSS_TOKENS, D, requires_grad=True), torch.randn(*LOSS_TOKENS, D)
    head, teacher_head = (0.02 * torch.randn(V, D)).requires_grad_(), 0.02 * torch.randn(V, D)
    mask = torch.ones(LOSS_TOKENS)
    before = peak_bytes(torch.device("cpu"))
    if chunk:
        loss, _ = chunked_sdft_loss(hidden, head, teacher_hidden, teacher_head, mask, chunk=chunk)
    else:
        loss, _ = sdft_loss(F.linear(hidden, head), F.linear(teacher_hidden, teacher_head), mask)
    loss.backward()
    return peak_bytes(torch.device("cpu")) - before


# --- The toy, and the import ----------------------------------------------------------------------------------------


def toy_update():
    """Seconds of the toy's update, and of the matrix products in it: rollout, both scorings, backward."""
    import train_toy
    from data import toy

    device, B, C = torch.device("cpu"), 64, train_toy.MAX_NEW_TOKENS
    student = GPT(GPTConfig(**train_toy.MODEL))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0)
    data = toy.skill("X", "train", 0)
    prompts, teacher_prompts = data["prompts"][:B], data["teacher_prompts"][:B]
    P, T = len(prompts[0]), len(teacher_prompts[0])
    layers = [m.weight for m in student.modules() if isinstance(m, torch.nn.Linear)]

    def products(positions, heads, backward=False):
        for w, n in [*((w, positions) for w in layers), (student.wte.weight, heads)]:
            x, y = torch.ones(n, w.size(1)), torch.ones(n, w.size(0))
            x @ w.t()
            if backward:
                y @ w
                y.t() @ x

    @torch.no_grad()
    def matrices():
        products(B * P, B)  # the rollout: prompts, then a token at a time
        for _ in range(C - 1):
            products(B, B)
        products(B * (T + C - 1), B * C)  # the teacher's scoring
        products(B * (P + C - 1), B * C, backward=True)

    update = lambda: train_step(student, teacher, optimizer, prompts, teacher_prompts, C, -1)
    return median_seconds(update, device, 50), median_seconds(matrices, device, 50)


def import_seconds(module):
    """Of a fresh interpreter that imports it and stops."""
    return median_seconds(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True), torch.device("cpu"), 9)


if __name__ == "__main__":
    whole, matrices = toy_update()
    print(f"the toy's update: {1e3 * whole:.1f} ms, {whole / matrices:.2f} times its matrix products ({1e3 * matrices:.1f} ms), {torch.get_num_threads()} threads")
    ours, torchs = import_seconds("sdft"), import_seconds("torch")
    print(f"import sdft: {ours:.2f} s, {ours / torchs:.2f} times import torch ({torchs:.2f} s)")
