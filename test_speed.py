"""Every faster path equals the plain one, one test per guarantee. CPU only, offline: python -m pytest -q test_speed.py"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import model as model_file
import train_gpt2
from model import GPT, GPTConfig, GraphedGPT, KVCache, StaticKVCache
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
    with pytest.raises(ValueError, match=next(iter(wrong))):
        chunked_sdft_loss(h, w, h, w, torch.ones(1, 2), **wrong)


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
    tokens = sample(p.expand(n, -1), [torch.Generator().manual_seed(i) for i in range(n)])
    counts = torch.bincount(tokens, minlength=7).double()
    assert not counts[p[0] == 0].any()
    possible = p[0] > 0
    chi2 = ((counts - n * p[0]) ** 2 / (n * p[0]))[possible].sum()
    assert chi2 < 16.3  # the 0.999 quantile at 3 degrees of freedom


def test_a_rows_token_depends_on_its_own_generator_alone():
    p = torch.rand(3, 50).softmax(-1)
    seeded = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
    together = sample(p, seeded(4, 5, 6))
    assert together.tolist() == [sample(p[i : i + 1], seeded(s)).item() for i, s in enumerate((4, 5, 6))]


# --- Caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 5], [7, 11]]], ids=["ragged", "even"])
def test_a_static_cache_gives_the_logits_of_the_growing_one(prompts):
    model, (idx, pad) = perturbed(), pad_left(prompts, "cpu")
    growing, static = KVCache(model, len(prompts), 12), StaticKVCache(model, len(prompts), 12)
    with torch.no_grad():
        for step in range(12 - idx.size(1) + 1):
            expected = model.next_logits(idx, pad, growing)
            torch.testing.assert_close(model.next_logits(idx, pad, static), expected, rtol=1e-5, atol=1e-5)
            idx = expected.argmax(-1, keepdim=True)
    assert static.length.item() == growing.length == 12


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


def replayed_by_calling(step):
    """What `record` promises, without a GPU: one run at once, every replay writes into the output of the recording."""
    step()
    output = []

    def replay():
        logits = step()
        output[:] = output or [torch.empty_like(logits)]
        return output[0].copy_(logits)

    return replay


@pytest.mark.parametrize("prompts", [PROMPTS, [[3]], [[3, 5], [7, 11]]], ids=["ragged", "one token", "even"])
def test_replayed_decoding_steps_say_what_the_model_says(prompts, monkeypatch):
    """The recording itself needs a GPU; everything around it is tested here."""
    monkeypatch.setattr(model_file, "record", replayed_by_calling)
    model = perturbed()
    graphed = GraphedGPT(model)
    for seed in range(3):  # every rollout has a cache, and so a recording, of its own
        expected = rollout(model, prompts, 10, EOS, generator=torch.Generator().manual_seed(seed))
        said = rollout(graphed, prompts, 10, EOS, generator=torch.Generator().manual_seed(seed))
        assert all(torch.equal(a, b) for a, b in zip(said, expected))


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
    "flags, dtype",
    [([], None), (["--rollout_dtype", "bfloat16"], torch.bfloat16), (["--dtype", "bfloat16"], torch.bfloat16), (["--dtype", "bfloat16", "--rollout_dtype", "float32"], None)],
)
def test_the_rollout_is_in_the_asked_dtype_and_by_default_in_that_of_the_arithmetic(flags, dtype):
    student = perturbed()
    sampler = train_gpt2.make_sampler(student, args(*flags), torch.device("cpu"))
    assert (sampler and sampler.wte.weight.dtype) == dtype and student.wte.weight.dtype == torch.float32


def test_cuda_graphs_without_a_gpu_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="--cuda_graphs needs"):
        train_gpt2.make_sampler(perturbed(), args("--cuda_graphs"), torch.device("cpu"))


def test_the_fused_optimiser_makes_the_plain_ones_updates():
    ours, plain = perturbed(), perturbed()
    fused = train_gpt2.make_optimizer(ours, args("--lr", "0.01", "--weight_decay", "0.1"))
    for optimizer in (fused, torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1, foreach=False)):
        torch.manual_seed(0)
        for _ in range(3):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bench_prints_every_phase_and_limit(tmp_path, capsys, monkeypatch):
    perturbed(block_size=1024, vocab_size=300).save_pretrained(tmp_path)
    monkeypatch.setattr(bench, "median_seconds", lambda f, device, repeats=5: f() is None and 1.0 or 1.0)
    monkeypatch.setattr(bench, "in_a_process", lambda f, *a: f(*a[:2], a[2]) or 1)
    train_gpt2.main(["--bench", "--init_from", str(tmp_path), "--device", "cpu", "--batch_size", "2", "--max_new_tokens", "4", "--rollout_dtype", "bfloat16"])
    said = capsys.readouterr().out
    for part in ("rollout in bfloat16", "GB/s", "| rollout |", "| teacher's scoring |", "| AdamW", "| EMA |", "| the whole update |", "tokens/s", "peak memory", "plain formula"):
        assert part in said, part


def test_the_benchs_step_leaves_the_gradients_for_the_next_one():
    model = perturbed()
    model(torch.tensor([[2, 3]])).sum().backward()
    grads = [p.grad for p in model.parameters()]
    bench.step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads))
