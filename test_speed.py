"""Every faster path equals the plain one, one test per guarantee. CPU only, offline: python -m pytest -q test_speed.py"""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import cuda_graphs
import train_gpt2
from cuda_graphs import GraphedGPT, StaticKVCache
from model import GPT, GPTConfig, KVCache, linear
from sdft import chunked_sdft_loss, completion_logits, pad_left, rollout, sample, sdft_loss, train_step

PROMPTS = [[3, 5, 7], [11], [13, 17, 19, 23]]
TEACHER_PROMPTS = [[29, 31, *p] for p in PROMPTS]
EOS = 1


def perturbed(seed=0, **sizes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=97, n_layer=2, n_head=2, n_embd=32) | sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


# --- The loss in chunks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_the_chunked_loss_and_its_gradients_equal_the_plain_ones(kl, reduction, chunk):
    torch.manual_seed(0)
    B, C, D, V = 4, 5, 8, 50
    hidden, head = torch.randn(B, C, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(B, C, 6), torch.randn(V, 6)  # a teacher of another width
    mask = torch.arange(C) < torch.tensor([[5], [2], [0], [3]])  # a row without a token, too
    plain, info = sdft_loss(F.linear(hidden, head), F.linear(teacher_hidden, teacher_head), mask, kl, reduction)
    expected = torch.autograd.grad(3 * plain, (hidden, head))
    loss, chunked = chunked_sdft_loss(hidden, head, teacher_hidden, teacher_head, mask, kl, reduction, chunk)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunked["kl"], info["kl"], rtol=1e-5, atol=1e-6)
    for ours, plain_grad in zip(torch.autograd.grad(3 * loss, (hidden, head)), expected):
        torch.testing.assert_close(ours, plain_grad, rtol=1e-5, atol=1e-5)


def test_a_batch_without_a_token_has_chunked_loss_0_and_gradient_0():
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss, info = chunked_sdft_loss(hidden, head, hidden, head, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not head.grad.any() and info["kl"].shape == (2, 3)


def test_the_teacher_gets_no_gradient_from_the_chunked_loss():
    student, teacher, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    chunked_sdft_loss(student, torch.randn(9, 4, requires_grad=True), teacher, head, torch.ones(2, 3))[0].backward()
    assert student.grad.any() and teacher.grad is None and head.grad is None


@pytest.mark.parametrize("wrong", [dict(kl="both"), dict(reduction="sum"), dict(chunk=0)])
def test_the_chunked_loss_names_a_wrong_argument(wrong):
    h, w = torch.randn(1, 2, 4), torch.randn(9, 4)
    for mask in (torch.ones(1, 2), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            chunked_sdft_loss(h, w, h, w, mask, **wrong)
    with pytest.raises(ValueError, match="mask"):
        chunked_sdft_loss(h, w, h, w, torch.ones(2, 1))


def test_a_head_in_bfloat16_gets_the_plain_gradient_however_small_the_chunks():
    torch.manual_seed(0)
    hidden, head, mask = torch.randn(4, 16, 8, dtype=torch.bfloat16), torch.randn(50, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(4, 16)
    teacher = torch.randn(4, 16, 8, dtype=torch.bfloat16)
    (exact,) = torch.autograd.grad(sdft_loss(F.linear(hidden.double(), head.double()), F.linear(teacher.double(), head.double()).detach(), mask)[0], head)
    (plain,) = torch.autograd.grad(sdft_loss(F.linear(hidden, head), F.linear(teacher, head).detach(), mask)[0], head)
    (chunked,) = torch.autograd.grad(chunked_sdft_loss(hidden, head, teacher, head, mask, chunk=1)[0], head)
    error = lambda grad: ((grad.double() - exact.double()).norm() / exact.double().norm()).item()
    assert error(chunked) < 1.5 * error(plain)


def test_a_frozen_head_costs_no_gradient_and_no_gradient_outlives_the_backward_pass():
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4)
    loss, _ = chunked_sdft_loss(hidden, head, hidden, head + 1, torch.ones(2, 3))
    assert loss.grad_fn.grads[0] is not None and loss.grad_fn.grads[1] is None
    loss.backward()
    assert loss.grad_fn.grads is None and hidden.grad.any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_the_chunked_loss_never_holds_the_logits_of_more_than_a_chunk():
    B, C, D, V, chunk = 4, 16, 8, 500, 8
    hidden, head, mask = torch.randn(B, C, D, requires_grad=True), torch.randn(V, D, requires_grad=True), torch.ones(B, C)
    with Largest() as chunked:
        chunked_sdft_loss(hidden, head, hidden.detach(), head.detach(), mask, chunk=chunk)[0].backward()
    with Largest() as plain:
        sdft_loss(F.linear(hidden, head), F.linear(hidden, head).detach(), mask)[0].backward()
    assert chunked.elements == max(chunk * V, V * D) and plain.elements == B * C * V


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("settings", [{}, dict(kl="forward", reduction="token", skip_tokens=1)])
def test_a_training_step_in_chunks_makes_the_plain_steps_update(micro_batch, settings):
    results = []
    for chunk in (None, 4):
        student, teacher = perturbed(0), perturbed(1).requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        loss, info = train_step(
            student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 9, EOS,
            generator=torch.Generator().manual_seed(0), micro_batch=micro_batch, chunk=chunk, **settings,
        )  # fmt: skip
        results.append((loss, info["kl"], *student.parameters(), *teacher.parameters()))
    for plain, chunked in zip(*results):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


# --- Sampling -------------------------------------------------------------------------------------------------------


def test_tokens_are_sampled_in_proportion_to_their_probability_and_never_at_0():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0]])
    n = 20000
    tokens = sample(p.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(tokens, minlength=7).double()
    assert not counts[p[0] == 0].any()
    possible = p[0] > 0
    chi2 = ((counts - n * p[0]) ** 2 / (n * p[0]))[possible].sum()
    assert chi2 < 16.3  # the 0.999 quantile at 3 degrees of freedom


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.4999, 1), (0.5001, 3), (0.9999, 5), (1 - 2**-24, 5)])
def test_a_token_is_where_the_distribution_function_passes_the_number(u, token):
    assert sample(torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0]]), torch.tensor([u])).item() == token


# --- Caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 5], [7, 11]]], ids=["ragged", "even"])
def test_a_static_cache_gives_the_logits_of_the_growing_one(prompts):
    model, (idx, pad) = perturbed(), pad_left(prompts, "cpu")
    growing, static = KVCache(model, len(prompts), 12), StaticKVCache(model, len(prompts), 12)
    addresses = id(static.length), id(static.kv)
    with torch.no_grad():
        for step in range(12 - idx.size(1) + 1):
            expected = model.next_logits(idx, pad, growing)
            torch.testing.assert_close(model.next_logits(idx, pad, static), expected, rtol=1e-5, atol=1e-5)
            idx = expected.argmax(-1, keepdim=True)
    assert static.length.item() == growing.length == 12
    assert addresses == (id(static.length), id(static.kv))  # a graph reads and writes these very tensors


def test_a_bfloat16_model_decodes_to_what_it_says_in_one_plain_pass():
    """Its cache is float32 on a CPU. To bfloat16's rounding: without a cache attention is in bfloat16."""
    model = perturbed().bfloat16()
    idx, pad = pad_left(PROMPTS, "cpu")
    whole = torch.cat([idx, torch.tensor([[2, 3, 4]] * 3)], 1)
    cache = model.kv_cache(3, whole.size(1))
    assert cache.kv.dtype == torch.float32
    with torch.no_grad():
        plain = model(whole, pad)[:, idx.size(1) - 1 :].float()
        cached = [model.next_logits(idx, pad, cache), *(model.next_logits(whole[:, t : t + 1], pad, cache) for t in range(idx.size(1), whole.size(1)))]
    torch.testing.assert_close(torch.stack(cached, 1), plain, rtol=0.05, atol=0.05 * plain.std().item())


class Replayed:
    """What `record` promises, without a GPU: one run at once; every replay reads the tensors of the recording and writes into its output."""

    def __init__(self, step):
        self.step, self.output = step, None
        step()
        frozen = inspect.getclosurevars(step).nonlocals
        self.graphed, self.cache = frozen["self"], frozen["cache"]
        self.tensors = self.graphed.idx, self.cache.length, self.cache.kv

    def __call__(self):
        now = self.graphed.idx, self.cache.length, self.cache.kv
        assert all(a is b for a, b in zip(now, self.tensors)), "a graph would go on with the tensors that it has recorded"
        logits = self.step()
        if self.output is None:
            self.output = torch.empty_like(logits)
        return self.output.copy_(logits)


@pytest.mark.parametrize("prompts", [PROMPTS, [[3]], [[3, 5], [7, 11]]], ids=["ragged", "one token", "even"])
def test_replayed_decoding_steps_say_what_the_model_says(prompts, monkeypatch):
    """The recording itself needs a GPU; everything around it is tested here."""
    monkeypatch.setattr(cuda_graphs, "record", Replayed)
    model = perturbed()
    graphed = GraphedGPT(model)
    for seed in range(3):  # every rollout has a cache, and so a recording, of its own
        expected = rollout(model, prompts, 10, EOS, generator=torch.Generator().manual_seed(seed))
        said = rollout(graphed, prompts, 10, EOS, generator=torch.Generator().manual_seed(seed))
        assert all(torch.equal(a, b) for a, b in zip(said, expected))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (4, 1, 8), (5, 7, 8)])
def test_a_few_rows_on_the_left_give_the_same_product(shape):
    x, weight, bias = torch.randn(shape), torch.randn(20, 8), torch.randn(20)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


# --- A sampler in place of the student -----------------------------------------------------------------------------


def test_the_sampler_speaks_with_the_students_current_weights_and_the_student_is_scored():
    student, teacher = perturbed(0), perturbed(1).requires_grad_(False)
    sampler = perturbed(2).bfloat16()  # stale weights, to be replaced
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for seed in range(2):
        before, teacher_before = copy.deepcopy(student), copy.deepcopy(teacher)
        loss, info = train_step(
            student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 9, EOS, sampler=sampler, generator=torch.Generator().manual_seed(seed)
        )
        expected = rollout(copy.deepcopy(before).bfloat16(), PROMPTS, 9, EOS, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(info["completions"], expected[0]) and torch.equal(info["mask"], expected[1])
        scores = (completion_logits(m, p, expected[0]) for m, p in ((before, PROMPTS), (teacher_before, TEACHER_PROMPTS)))
        torch.testing.assert_close(torch.tensor(loss), sdft_loss(*scores, expected[1])[0].detach())


# --- train_gpt2.py --------------------------------------------------------------------------------------------------


def args(*flags):
    return train_gpt2.parse_args(["--out_dir", "unused", *flags])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], torch.float32),
        (["--rollout_dtype", "bfloat16"], torch.bfloat16),
        (["--dtype", "bfloat16"], torch.bfloat16),
        (["--dtype", "bfloat16", "--rollout_dtype", "float32"], torch.float32),
    ],
)
def test_the_rollout_is_in_the_asked_dtype_and_by_default_in_that_of_the_arithmetic(flags, expected):
    student, teacher, asked, cpu = perturbed(), perturbed(1).requires_grad_(False), args(*flags), torch.device("cpu")
    sampler = train_gpt2.make_sampler(student, asked, cpu)
    seen, scoring = [], []
    for model in {student, sampler} - {None}:
        kept = lambda module, x, y: (seen if len(y) == len(PROMPTS) and not torch.is_grad_enabled() else scoring).append(y.dtype)
        model.h[0].attn.c_attn.register_forward_hook(kept)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with train_gpt2.autocast(asked, cpu):
        train_step(student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 5, EOS, sampler=sampler)
    assert set(seen) == {expected}
    assert set(scoring) == {torch.bfloat16 if "--dtype" in flags else torch.float32}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_cuda_graphs_without_a_gpu_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="--cuda_graphs needs"):
        train_gpt2.make_sampler(perturbed(), args("--cuda_graphs"), torch.device("cpu"))


def test_the_fused_optimiser_makes_the_plain_ones_updates():
    ours, plain = perturbed(), perturbed()
    fused = train_gpt2.make_optimizer(ours, args("--lr", "0.01", "--weight_decay", "0.1"))
    assert fused.defaults["fused"]
    for optimizer in (fused, torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1, foreach=False)):
        torch.manual_seed(0)
        for _ in range(3):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_size", [160, 1024])
def test_bench_prints_every_phase_and_limit(block_size, tmp_path, capsys, monkeypatch):
    perturbed(block_size=block_size, vocab_size=300).save_pretrained(tmp_path)
    once = lambda f, device, repeats=5: f() is None or 0.5
    monkeypatch.setattr(bench, "median_seconds", once)
    flags = "--device cpu --batch_size 2 --max_new_tokens 32 --rollout_dtype bfloat16"
    train_gpt2.main(["--bench", "--init_from", str(tmp_path), *flags.split()])
    said = capsys.readouterr().out
    for part in ("rollout in bfloat16", "GB/s", "| rollout |", "| teacher's scoring |", "AdamW |", "| EMA |", "| the whole update |", "tokens/s"):
        assert part in said, part
    assert f"a token of {min(512, block_size - 64)} costs" in said


def test_bench_names_what_does_not_fit(tmp_path):
    perturbed().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="do not fit block_size 32"):
        train_gpt2.main(["--bench", "--init_from", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit, match="--init_from"):
        train_gpt2.main(["--bench", "--init_from", str(tmp_path / "nothing"), "--device", "cpu"])


@pytest.mark.skipif(not bench.memory("VmHWM"), reason="/proc is Linux's")
def test_the_peak_of_a_process_of_its_own_does_not_count_the_parents():
    held = torch.zeros(2**28)  # 1 GiB
    held.fill_(1.0)
    del held
    assert bench.in_a_process("memory('VmHWM')") < 0.9 * 2**30 < bench.memory("VmHWM")
