"""What an SDFT update costs on this machine, phase by phase, and how close each phase comes to what the machine can do.

    python train_gpt2.py --bench   # GPT-2's size, random weights; some minutes on two cores
    python -m bench                # what every fast path gains, the toy's update against its matrix products, `import sdft`

Times are medians of several runs after one that does not count. The limits are measured in the same run: the bandwidth by
summing a large array, the rate of arithmetic by multiplying two large matrices. A phase's share of them is the time
that its reading or its arithmetic alone would take there, whichever is longer, over the time that it takes.
"""

import copy
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, linear
from sdft import chunked_sdft_loss, completion_hidden, ema_update, rollout, sample, sdft_loss, train_step, update

PROMPT, TEACHER_PROMPT = 64, 128  # tokens


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


def memory(field, device=torch.device("cpu")):
    """Bytes of this process: "VmHWM" the peak, "VmRSS" now (Linux); on a GPU the peak of what was allocated there. None elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage's peak would count the parent's
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1]) if status.exists() else None


def name(dtype):
    return str(dtype).removeprefix("torch.")


# --- An update of GPT-2 ---------------------------------------------------------------------------------------------


def bench(student, sampler, optimizer, chunk, B, C, kl, dtype, device):
    """Prints the table, for B rows of C tokens. sampler: what rolls out; optimizer: over the student's weights; dtype: of the passes, whose
    autocast is the caller's."""
    V, rollout_dtype = student.config.vocab_size, sampler.wte.weight.dtype
    print(
        f"device {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n{sum(p.numel() for p in student.parameters()) / 1e6:.0f}M parameters, arithmetic in {name(dtype)}, "
        f"rollout in {name(rollout_dtype)}\nbatch {B}, prompt {PROMPT}, teacher's prompt {TEACHER_PROMPT}, completion {C} tokens",
        flush=True,
    )
    with torch.autocast(device.type, enabled=False):
        bandwidth, matmul = limits(device, dtype)
        rollout_matmul = matmul if rollout_dtype == dtype else limits(device, rollout_dtype)[1]
    rates = {name(rollout_dtype): rollout_matmul, name(dtype): matmul}
    print(f"limits: {bandwidth / 1e9:.1f} GB/s, " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {n}" for n, rate in rates.items()) + "\n")

    teacher = copy.deepcopy(student).requires_grad_(False)
    prompts, teacher_prompts = ([torch.randint(V, (n,)).tolist() for _ in range(B)] for n in (PROMPT, TEACHER_PROMPT))
    generators = [torch.Generator(device).manual_seed(b) for b in range(B)]

    def say(n):
        with torch.autocast(device.type, enabled=False):
            return rollout(sampler, prompts, n, -1, generator=generators)  # no token is -1: every row has n tokens

    weights = sum(p.numel() for p in student.parameters())
    blocks, head = sum(p.numel() for p in student.h.parameters()), V * student.config.n_embd

    def products(positions, heads, rate, passes=1):
        """Seconds of the matrix products alone: 2 operations per weight and position in every pass."""
        return passes * 2 * (positions * blocks + heads * head) / rate

    completions, mask = say(C)
    rollout_s, rollout_bytes = median_seconds(lambda: say(C), device, 3), weights * rollout_dtype.itemsize
    best = products(B * PROMPT, B, rollout_matmul) + (C - 1) * max(products(B, B, rollout_matmul), rollout_bytes / bandwidth)
    rows = [("rollout", rollout_s, best)]

    with torch.no_grad():
        scored = completion_hidden(teacher, teacher_prompts, completions)
        seconds = median_seconds(lambda: completion_hidden(teacher, teacher_prompts, completions), device)
    rows += [("teacher's scoring", seconds, products(B * (TEACHER_PROMPT + C), 0, matmul))]

    def score_and_backward():
        hidden = completion_hidden(student, prompts, completions)
        chunked_sdft_loss(hidden, student.wte.weight, scored, teacher.wte.weight, mask, kl, chunk=chunk)[0].backward()

    # one pass forward and two backward; the teacher's logits once more
    best = products(B * (PROMPT + C), B * C, matmul, 3) + products(0, B * C, matmul)
    rows += [("student's scoring, loss, backward", median_seconds(score_and_backward, device), best)]
    grads = [p.grad for p in student.parameters()]

    def step():
        update(student, optimizer, 0.0)
        for p, grad in zip(student.parameters(), grads):
            p.grad = grad  # for the next run

    # clipping reads and writes the gradient; AdamW reads weight, gradient and two moments, and writes all but the gradient
    rows += [("clipping, AdamW", median_seconds(step, device), 4 * weights * 9 / bandwidth)]
    rows += [("EMA", median_seconds(lambda: ema_update(teacher, student, 0.02), device), 4 * weights * 3 / bandwidth)]
    settings = dict(kl=kl, generator=generators, sampler=None if sampler is student else sampler, chunk=chunk)
    whole = median_seconds(lambda: train_step(student, teacher, optimizer, prompts, teacher_prompts, C, -1, **settings), device, 3)
    rows += [("the whole update", whole, sum(best for *_, best in rows))]

    print("| phase | ms | share of the limit |\n|---|---:|---:|")
    for phase, seconds, best in rows:
        print(f"| {phase} | {1e3 * seconds:,.0f} | {best / seconds:.0%} |")
    print(f"\nrollout: {B * C / rollout_s:.0f} tokens/s, {rollout_bytes * C / rollout_s / 1e9:.1f} GB/s of weights read", flush=True)
    if peak := memory("VmHWM", device):
        print(f"peak memory: {peak / 2**20:,.0f} MiB")
    long = min(512, student.config.block_size - PROMPT)
    per_token = [median_seconds(lambda: say(n), device, 1) / n for n in (32, long)]
    print(f"a token of {long} costs {per_token[1] / per_token[0]:.2f} times one of 32 (one run each)")


# --- What every fast path gains -------------------------------------------------------------------------------------


def gains():
    """Rows (what, plain, fast) in ms, at GPT-2's size and 8 rows, on the CPU."""
    cpu, V, D = torch.device("cpu"), 50257, 768
    ms = lambda f: 1e3 * median_seconds(f, cpu, 30)
    x, head, wide = torch.randn(8, D), [torch.randn(V, D)], [torch.randn(3 * D, D) for _ in range(12)]  # of all layers, as they come from memory
    p = torch.randn(8, V).softmax(-1)
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    with torch.no_grad():
        for what, weights in [("logits in float32, weights on the right of the product, or on the left", head), ("queries, keys and values, likewise", wide)]:
            yield f"a step's {what}", *(ms(lambda: [product(x, w) for w in weights]) for product in (F.linear, linear))
        q, kv = torch.randn(8, 12, 1, 64), torch.randn(2, 8, 12, 128, 64)
        attention = lambda q, kv: ms(lambda: F.scaled_dot_product_attention(q, *kv))
        yield "a step's attention to 128 keys: bfloat16, or float32", attention(q.bfloat16(), kv.bfloat16()), attention(q, kv)
        multinomial = lambda: [torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators)]
        yield "a token for 8 rows: torch.multinomial, or inverse", ms(multinomial), ms(lambda: sample(p, torch.rand(8)))
    student = GPT(GPTConfig())
    for w in student.parameters():
        w.grad = torch.randn_like(w)
    adamw = lambda fused: 1e3 * median_seconds(torch.optim.AdamW(student.parameters(), lr=1e-5, fused=fused).step, cpu, 5)
    yield "AdamW: plain, or fused", adamw(False), adamw(True)


def loss_memory(chunk):
    """Bytes that loss and backward add to the peak, 2,048 tokens at GPT-2's size; chunk 0: the plain formula on full logits."""
    V, D, shape = 50257, 768, (16, 128)
    hidden, teacher_hidden = torch.randn(*shape, D, requires_grad=True), torch.randn(*shape, D)
    head, teacher_head = torch.randn(V, D).mul_(0.02).requires_grad_(), torch.randn(V, D).mul_(0.02)
    before, mask = memory("VmRSS"), torch.ones(shape)
    if chunk:
        loss, _ = chunked_sdft_loss(hidden, head, teacher_hidden, teacher_head, mask, chunk=chunk)
    else:
        loss, _ = sdft_loss(F.linear(hidden, head), F.linear(teacher_hidden, teacher_head), mask)
    loss.backward()
    return memory("VmHWM") - before


def in_a_process(call):
    """What bench.CALL prints in a process of its own: the peak of a process never falls."""
    said = subprocess.run([sys.executable, "-c", f"import bench; print(bench.{call})"], check=True, capture_output=True, text=True)
    return float(said.stdout)


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


def main():
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n| plain, or fast | plain | fast |\n|---|---:|---:|")
    for what, plain, fast in gains():
        print(f"| {what} | {plain:.2f} ms | {fast:.2f} ms |", flush=True)
    if memory("VmHWM"):
        plain, fast = (in_a_process(f"loss_memory({chunk})") / 2**20 for chunk in (0, 128))
        print(f"| peak of loss and backward, 2,048 tokens: all logits, or 128 at a time | {plain:,.0f} MiB | {fast:,.0f} MiB |", flush=True)
    whole, matrices = toy_update()
    print(f"\nthe toy's update: {1e3 * whole:.1f} ms, {whole / matrices:.2f} times its matrix products alone ({1e3 * matrices:.1f} ms)")
    ours, torchs = import_seconds("sdft"), import_seconds("torch")
    print(f"import sdft: {ours:.2f} s, {ours / torchs:.2f} times import torch ({torchs:.2f} s)")


if __name__ == "__main__":
    main()
