"""What this project guarantees about the method, one test per guarantee. CPU only, offline: python -m pytest -q

Oracles are independent of the code under test: torch.distributions, finite differences, plain Python, a model without a cache.
"""

import copy
import inspect
import json
import re
import subprocess
import sys
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D

import train_toy
from data import toy
from model import GPT, GPTConfig, KVCache
from sdft import (
    completion_logits,
    ema_update,
    rollout,
    sdft_loss,
    sft_loss,
    student_context,
    teacher_context,
    train_step,
    update,
)

HERE = Path(__file__).parent
KLS, REDUCTIONS = ["reverse", "forward", "jsd"], ["sequence", "token"]
EOS = 0
PROMPTS = [[5, 3, 8], [7], [2, 9, 4, 11, 6], [1, 1]]  # ragged on purpose
TEACHER_PROMPTS = [[5, 3, 8, 10, 2], [7, 1, 2, 3, 4, 5, 6], [2, 9, 4, 11, 6, 3], [1, 1, 9]]


def small_model(seed=0, noise=0.3):
    """A model whose every weight matters: biases and LayerNorms are perturbed too, so that a dropped one shows."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=24, vocab_size=13, n_layer=2, n_head=2, n_embd=16)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def logits_and_mask(seed=0, B=3, C=5, V=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(B, C, V, generator=g, dtype=dtype) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])[:B, :C]
    return student, teacher, mask


def oracle_kl(student, teacher, kl):
    p, q = D.Categorical(logits=student), D.Categorical(logits=teacher)
    if kl == "jsd":
        m = D.Categorical(probs=(p.probs + q.probs) / 2)
        return (D.kl_divergence(p, m) + D.kl_divergence(q, m)) / 2
    return D.kl_divergence(p, q) if kl == "reverse" else D.kl_divergence(q, p)


# --- The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_is_the_kl_of_torch_distributions_in_the_named_direction(kl, reduction):
    student, teacher, mask = logits_and_mask()
    per_token = oracle_kl(student, teacher, kl)
    rows = [[float(k) for k, m in zip(*row) if m] for row in zip(per_token, mask)]
    if reduction == "sequence":
        expected = sum(sum(r) / len(r) for r in rows) / len(rows)
    else:
        expected = sum(map(sum, rows)) / sum(map(len, rows))
    loss, info = sdft_loss(student, teacher, mask, kl, reduction)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(info["kl"], per_token * mask)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_the_loss_equals_finite_differences(kl, reduction):
    student, teacher, mask = logits_and_mask()
    assert torch.autograd.gradcheck(lambda s: sdft_loss(s, teacher, mask, kl, reduction)[0], student.requires_grad_())


def test_reverse_is_the_default_and_differs_from_forward():
    student, teacher, mask = logits_and_mask()
    reverse, forward = (sdft_loss(student, teacher, mask, kl)[0] for kl in ("reverse", "forward"))
    assert sdft_loss(student, teacher, mask)[0] == reverse != forward
    assert sdft_loss(teacher, student, mask)[0].item() == pytest.approx(forward.item())


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_logits_give_exactly_zero_loss_and_gradient(kl, dtype):
    student = (5 * torch.randn(4, 6, 1000, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
    loss, _ = sdft_loss(student, student.detach().clone(), torch.ones(4, 6), kl)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max().item() == 0


@pytest.mark.parametrize("kl", KLS)
def test_teacher_logits_never_receive_a_gradient(kl):
    student, teacher, mask = logits_and_mask()
    teacher.requires_grad_()
    sdft_loss(student.requires_grad_(), teacher, mask, kl)[0].backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fully_masked_rows_and_batches_give_zero_and_no_nan(kl, reduction):
    student, teacher, mask = logits_and_mask()
    student.requires_grad_()
    mask[1] = 0
    loss, info = sdft_loss(student, teacher, mask, kl, reduction)
    loss.backward()
    assert torch.isfinite(loss) and info["kl"][1].abs().sum() == 0 and student.grad[1].abs().sum() == 0
    student.grad = None
    loss, _ = sdft_loss(student, teacher, torch.zeros_like(mask), kl, reduction)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().sum() == 0


@pytest.mark.parametrize("kl", KLS)
def test_masked_tokens_change_neither_loss_nor_gradient(kl):
    student, teacher, mask = logits_and_mask()
    results = []
    for filler in (0.0, 50.0):
        s = student.where(mask[..., None] == 1, torch.full_like(student, filler)).requires_grad_()
        s2 = s * torch.arange(7)  # uneven filler logits
        loss, _ = sdft_loss(s.where(mask[..., None] == 1, s2), teacher, mask, kl)
        results.append((loss, torch.autograd.grad(loss, s)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("kl", KLS)
def test_half_precision_logits_are_scored_in_float32_and_extreme_ones_stay_finite(kl):
    student, teacher, mask = logits_and_mask()
    half = sdft_loss(student.bfloat16(), teacher.bfloat16(), mask, kl)[0]
    exact = sdft_loss(student.bfloat16().double(), teacher.bfloat16().double(), mask, kl)[0]
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-5)
    s = (1e4 * student.float()).requires_grad_()
    loss, _ = sdft_loss(s, -1e4 * teacher.float(), mask, kl)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(s.grad).all()


def test_sft_loss_is_the_expert_tokens_negative_log_likelihood():
    logits, _, mask = logits_and_mask()
    tokens = torch.randint(7, mask.shape, generator=torch.Generator().manual_seed(0))
    nll = -D.Categorical(logits=logits.float()).log_prob(tokens)
    expected = np.mean([float(n[m == 1].mean()) for n, m in zip(nll, mask)])
    assert sft_loss(logits, tokens, mask).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(kl="backward"), "reverse"),
        (dict(reduction="sum"), "sequence"),
        (dict(teacher_logits=torch.zeros(3, 4, 7)), "shapes do not match"),
        (dict(mask=torch.ones(3, 4)), "shapes do not match"),
        (dict(mask=torch.ones(3)), "shapes do not match"),
    ],
)
def test_wrong_arguments_to_the_loss_are_named_in_one_line(change, words):
    student, teacher, mask = logits_and_mask()
    with pytest.raises(ValueError, match=words) as e:
        sdft_loss(**(dict(student_logits=student, teacher_logits=teacher, mask=mask) | change))
    assert "\n" not in str(e.value)


# --- Rollout and scoring --------------------------------------------------------------------------------------------


def uncached_rollout(model, prompts, max_new_tokens, temperature, generator):
    """The twin that `rollout` has to equal: no cache and no padding, every row read anew for every token."""
    rows = [list(p) for p in prompts]
    running = [True] * len(rows)
    replies = [[] for _ in rows]
    for _ in range(max_new_tokens):
        logits = torch.stack([model(torch.tensor([r]))[0, -1] for r in rows]).float()
        if temperature == 0:
            tokens = logits.argmax(-1).tolist()
        else:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
        for i, t in enumerate(tokens):
            t = t if running[i] else EOS
            rows[i].append(t)
            if running[i]:
                replies[i].append(t)
            running[i] = running[i] and t != EOS
        if not any(running):
            break
    return replies


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 4], [5, 6], [7, 8]]], ids=["ragged", "even"])
def test_cached_rollout_equals_the_uncached_one(temperature, prompts):
    for seed in range(5):
        model = small_model(seed)
        completions, mask = rollout(model, prompts, 8, EOS, temperature, torch.Generator().manual_seed(seed))
        expected = uncached_rollout(model, prompts, 8, temperature, torch.Generator().manual_seed(seed))
        assert [c[m].tolist() for c, m in zip(completions, mask)] == expected


def test_rollout_ends_each_row_at_its_own_first_eos_and_counts_that_eos():
    completions, mask = rollout(small_model(), [[1, 2]] * 64, 12, EOS, 1.0, torch.Generator().manual_seed(0))
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 3  # rows did end at different times
    for row, m, n in zip(completions, mask, lengths):
        assert m[:n].all() and not m[n:].any()
        assert (row[: n - 1] != EOS).all() and (row[n:] == EOS).all()
        assert n == 12 or row[n - 1] == EOS


def test_the_first_eos_is_trained_on_and_nothing_after_it():
    completions, mask = rollout(small_model(), PROMPTS * 8, 12, EOS, 1.0, torch.Generator().manual_seed(0))
    student = torch.randn(*mask.shape, 13, requires_grad=True)
    sdft_loss(student, torch.randn(*mask.shape, 13), mask)[0].backward()
    learns = student.grad.abs().sum(-1) > 0
    for row, l in zip(completions.tolist(), learns.tolist()):
        n = row.index(EOS) + 1 if EOS in row else len(row)
        assert l == [True] * n + [False] * (len(row) - n)


def test_padding_and_neighbours_change_no_logit():
    model = small_model()
    completions = torch.randint(1, 13, (4, 6), generator=torch.Generator().manual_seed(0))
    together = completion_logits(model, PROMPTS, completions)
    for i, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([prompt + completions[i].tolist()]))[0, len(prompt) - 1 : -1]  # plain, no padding
        torch.testing.assert_close(together[i], alone)


def test_the_model_is_gpt2_computed_by_hand():
    """GPT-2 written out for one row: pre-norm, tanh GELU, causal attention by loops over heads, tied head."""
    model, tokens = small_model(), torch.tensor([3, 1, 4, 1, 5])
    w, H, D, T = model.state_dict(), 2, 16, len(tokens)
    norm = lambda x, k: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * w[k + ".weight"] + w[k + ".bias"]
    linear = lambda x, k: x @ w[k + ".weight"].T + w[k + ".bias"]
    gelu = lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(2):
        q, k, v = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(D, -1)
        heads = []
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            score = (q[:, part] @ k[:, part].T / (D / H) ** 0.5).masked_fill(torch.ones(T, T).triu(1) == 1, float("-inf"))
            heads.append(score.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, -1), f"h.{layer}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")), f"h.{layer}.mlp.c_proj")
    torch.testing.assert_close(model(tokens[None])[0], norm(x, "ln_f") @ w["wte.weight"].T)


def test_residual_projections_start_smaller_the_deeper_the_model():
    torch.manual_seed(0)
    block = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=8, n_head=2, n_embd=64)).h[0]
    for layer in (block.attn.c_proj, block.mlp.c_proj):
        assert layer.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05) and not block.mlp.c_fc.bias.any()


@pytest.mark.parametrize("pad", [torch.tensor([0, 4, 2]), None], ids=["ragged", "even"])
def test_prefill_and_decode_with_a_cache_equal_one_plain_forward(pad):
    model, tokens = small_model(), torch.randint(1, 13, (3, 10))
    with torch.no_grad():
        whole = model(tokens, pad)
        cache = KVCache(model, 3, 10)
        parts = torch.cat([model(tokens[:, a:b], pad, cache) for a, b in [(0, 5), (5, 6), (6, 9), (9, 10)]], 1)
        for i, n in enumerate([0, 0, 0] if pad is None else pad.tolist()):
            torch.testing.assert_close(parts[i, n:], whole[i, n:])
            torch.testing.assert_close(parts[i, n:], model(tokens[i : i + 1, n:])[0])


def test_student_and_teacher_logits_align_on_the_completion_though_prompts_differ_in_length():
    model = small_model()
    completions, _ = rollout(model, PROMPTS, 6, EOS, 1.0, torch.Generator().manual_seed(3))
    for i in range(4):
        for prompts in (PROMPTS, TEACHER_PROMPTS):
            got = completion_logits(model, prompts, completions)[i].log_softmax(-1)
            for t, token in enumerate(completions[i].tolist()):  # token t is predicted from what stands before it
                before = prompts[i] + completions[i, :t].tolist()
                expected = model(torch.tensor([before]))[0, -1].log_softmax(-1)
                torch.testing.assert_close(got[t], expected)


@pytest.mark.parametrize(
    "prompts, settings, words",
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "at least one token"),
        ([[1] * 20], {}, "block_size=24"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0"),
        ([[1]], dict(temperature=-1), "temperature=-1"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused_before_anything_runs(prompts, settings, words):
    with pytest.raises(ValueError, match=words) as e:
        rollout(small_model(), prompts, **(dict(max_new_tokens=6, eos_id=EOS) | settings))
    assert "\n" not in str(e.value)


def test_a_teacher_prompt_longer_than_block_size_is_refused_and_never_truncated():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="block_size=24"):
        train_step(model, copy.deepcopy(model), optimizer, [[1, 2]], [[1] * 25], 4, EOS)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_teacher_context_holds_everything_the_student_sees_and_the_demonstration_once():
    prompt, demonstration, article = "Who wrote Emma?", "Jane Austen did.", "Emma is a novel of 1815."
    text = teacher_context(prompt, demonstration, article)
    assert student_context(prompt) == prompt
    assert [text.count(part) for part in (prompt, demonstration, article)] == [1, 1, 1]
    assert text.index(article) < text.index(prompt) < text.index(demonstration)
    assert article not in teacher_context(prompt, demonstration)


# --- Teacher and training step --------------------------------------------------------------------------------------


def step(student, teacher, seed=0, lr=0.1, prompts=PROMPTS, teacher_prompts=TEACHER_PROMPTS, **kw):
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    g = torch.Generator().manual_seed(seed)
    return train_step(student, teacher, optimizer, prompts, teacher_prompts, 6, EOS, generator=g, **kw)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reduction, temperature", [("sequence", 1.0), ("token", 0.5)])
def test_a_step_is_algorithm_1_computed_by_hand(kl, reduction, temperature):
    student, teacher, alpha, lr, clip = small_model(0), small_model(1), 0.25, 0.1, 0.05
    # step 2: the student's own response, by the uncached twin
    replies = uncached_rollout(student, PROMPTS, 6, temperature, torch.Generator().manual_seed(9))
    # steps 3 and 4: row by row, without padding; the first token is skipped
    rows = []
    for prompt, teacher_prompt, y in zip(PROMPTS, TEACHER_PROMPTS, replies):
        s = student(torch.tensor([prompt + y]))[0, len(prompt) - 1 : -1]
        t = teacher(torch.tensor([teacher_prompt + y]))[0, len(teacher_prompt) - 1 : -1].detach()
        rows.append(oracle_kl(s, t, kl)[1:])
    assert len({len(r) for r in rows}) > 1
    if reduction == "sequence":
        loss = sum(r.mean() if len(r) else r.sum() for r in rows) / len(rows)
    else:
        loss = torch.cat(rows).mean()
    # step 5: clipped gradient descent, then the EMA of the new student
    grads = dict(zip(dict(student.named_parameters()), torch.autograd.grad(loss, student.parameters())))
    scale = clip / torch.stack([g.norm() for g in grads.values()]).norm()
    assert scale < 1  # or the clip would not be tested
    new = {k: p.detach() - lr * scale * grads[k] for k, p in student.named_parameters()}
    ema = {k: alpha * new[k] + (1 - alpha) * p.detach() for k, p in teacher.named_parameters()}

    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    got, info = train_step(
        student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 6, EOS, kl=kl, reduction=reduction, alpha=alpha, clip=clip,
        temperature=temperature, skip_tokens=1, micro_batch=3, generator=torch.Generator().manual_seed(9),
    )  # fmt: skip
    assert [c[m].tolist() for c, m in zip(info["completions"], info["mask"])] == replies
    assert got == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(dict(student.named_parameters()), new, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dict(teacher.named_parameters()), ema, rtol=1e-5, atol=1e-7)


def test_the_defaults_of_a_step_are_the_papers():
    p = {k: v.default for k, v in inspect.signature(train_step).parameters.items()}
    assert (p["kl"], p["reduction"], p["alpha"], p["temperature"], p["clip"], p["skip_tokens"]) == ("reverse", "sequence", 0.02, 1.0, 1.0, 0)


@pytest.mark.parametrize("wrong", [dict(teacher_prompts=[[1]]), dict(skip_tokens=-1), dict(micro_batch=0 - 1)])
def test_a_step_refuses_wrong_arguments_before_anything_runs(wrong):
    student = small_model()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="must"):
        step(student, copy.deepcopy(student), **wrong)
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kl", KLS)
def test_a_teacher_with_the_students_weights_and_prompts_teaches_exactly_nothing(kl):
    student = small_model()
    before = copy.deepcopy(student.state_dict())
    loss, _ = step(student, copy.deepcopy(student), teacher_prompts=PROMPTS, kl=kl)
    assert loss == 0
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)


def test_a_step_moves_the_student_and_no_gradient_reaches_the_teacher():
    student = small_model()
    teacher = copy.deepcopy(student)  # its parameters even ask for gradients
    frozen = copy.deepcopy(student.state_dict())
    loss, _ = step(student, teacher, alpha=0.0)
    assert loss > 0 and all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), frozen, rtol=0, atol=0)
    assert all(not torch.equal(p, frozen[k]) for k, p in student.named_parameters() if k != "wpe.weight")


def test_a_step_brings_the_student_closer_to_the_teacher_on_its_own_responses():
    student = small_model()
    teacher = copy.deepcopy(student)
    losses = [step(student, teacher, seed=0, alpha=0.0)[0] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_equal_one_batch(reduction, micro_batch):
    whole, parts = small_model(), small_model()
    a, info_a = step(whole, copy.deepcopy(whole), reduction=reduction)
    b, info_b = step(parts, copy.deepcopy(parts), reduction=reduction, micro_batch=micro_batch)
    assert a == pytest.approx(b, rel=1e-12)
    assert info_a["mask"].sum(1).unique().numel() > 1  # rows of different lengths, or the test would show nothing
    torch.testing.assert_close(info_a, info_b)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict())


def test_skipped_tokens_carry_no_loss_and_short_responses_no_nan():
    student = small_model()
    loss, info = step(student, copy.deepcopy(student), skip_tokens=2)
    assert loss > 0 and (info["kl"][:, :2] == 0).all() and info["kl"][:, 2:].sum() > 0
    before = copy.deepcopy(student.state_dict())
    loss, _ = step(student, copy.deepcopy(student), skip_tokens=99)
    assert loss == 0
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)


def test_ema_arithmetic_with_buffers():
    teacher, student = (torch.nn.BatchNorm1d(3) for _ in range(2))
    with torch.no_grad():
        for k, (t, s) in enumerate(zip(teacher.state_dict().values(), student.state_dict().values())):
            t.fill_(1), s.fill_(k + 11)
    ema_update(teacher, student, 0.25)
    expected = [0.25 * (k + 11) + 0.75 for k in range(4)] + [15]  # the counter of batches is an integer: copied
    assert [float(t.flatten()[0]) for t in teacher.state_dict().values()] == expected


def test_alpha_0_freezes_the_teacher_and_alpha_1_makes_it_the_student():
    teacher, student = small_model(0), small_model(1)
    before = copy.deepcopy(teacher.state_dict())
    ema_update(teacher, student, 0.0)
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    ema_update(teacher, student, 1.0)
    torch.testing.assert_close(teacher.state_dict(), student.state_dict(), rtol=0, atol=0)


def test_ema_follows_small_updates_and_refuses_weights_too_coarse_for_them():
    teacher, student = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with torch.no_grad():
        for p, q in zip(teacher.parameters(), student.parameters()):
            p.fill_(1.0), q.fill_(1.01)
    for _ in range(250):
        ema_update(teacher, student.bfloat16(), 0.01)  # a student in half precision is fine
    t, s = teacher.weight[0, 0].item(), student.weight[0, 0].item()
    assert (t - 1) / (s - 1) == pytest.approx(1 - 0.99**250, abs=1e-3)  # 92% of the gap closed
    with pytest.raises(ValueError, match="float32"):
        ema_update(teacher.bfloat16(), student, 0.01)


@pytest.mark.parametrize("loss, gradient", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_a_loss_or_gradient_that_is_not_finite_is_refused_with_the_weights_untouched(loss, gradient):
    student = small_model()
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    for p in student.parameters():
        p.grad = torch.full_like(p, gradient)
    with pytest.raises(FloatingPointError, match="not finite"):
        update(student, optimizer, loss)
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_whose_logits_are_not_finite_says_nothing_rather_than_something(temperature):
    model = small_model()
    with torch.no_grad():
        model.ln_f.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        rollout(model, PROMPTS, 4, EOS, temperature)


def test_the_smallest_temperature_is_greedy():
    assert torch.equal(rollout(small_model(), PROMPTS, 6, EOS, 1e-40)[0], rollout(small_model(), PROMPTS, 6, EOS, 0)[0])


# --- The toy world --------------------------------------------------------------------------------------------------


def by_hand(name, digits):
    """An answer without numpy or tables; those of X, Y and Z are decimals of a square root, by another route than the world's."""
    root = {"X": 2, "Y": 3, "Z": 5}.get(name)
    with localcontext() as context:
        context.prec = 120
        decimals = str(Decimal(root).sqrt())[2:] if root else ""
    rule = {
        "A": lambda a, b: a + b, "B": lambda a, b: a - b, "C": max, "D": min, "E": lambda a, b: abs(a - b),
        "F": lambda a, b: a * b, "G": lambda a, b: 3 * a + b, "H": lambda a, b: 9 - a if b % 2 else a,
    }.get(name, lambda a, b: int(decimals[10 * a + b]))  # fmt: skip
    first = rule(digits[0], digits[1]) % 10
    return [first, rule(first, digits[2]) % 10]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_toy_worlds_answers_are_right_in_both_styles(split):
    for name in toy.KNOWN:
        data = toy.skill(name, split)
        for prompt, teacher, demonstration, answer in zip(*(map(toy.decode, data[k]) for k in data)):
            assert re.fullmatch(rf"\?{name}\d\d\d=", prompt)
            own = "".join(map(str, by_hand(name, [int(c) for c in prompt[2:5]])))
            expert = "".join("abcdefghij"[int(c)] for c in own)
            assert answer == own + "." and demonstration == expert + "."
            assert teacher == f"{prompt[:-1]}!{demonstration}="


def test_training_validation_and_test_inputs_are_disjoint_and_cover_the_world():
    for name in toy.KNOWN:
        seen = [toy.decode(p) for s in ("train", "val", "test") for p in toy.skill(name, s, seed=3)["prompts"]]
        assert len(seen) == len(set(seen)) == 1000


def pretraining_lines(batch, demonstration, n=20000, **kw):
    """Prompts and answers of pretraining as text, those whose part after `!` is of that form."""
    rng, lines = np.random.default_rng(0), []
    while len(lines) < n:
        pairs = zip(*(map(toy.decode, part) for part in batch(rng, 2000, **kw)))
        lines += [(p, a) for p, a in pairs if re.fullmatch(demonstration, p.partition("!")[2])]
    return lines


def test_pretraining_teaches_prior_skills_always_and_new_ones_as_often_as_it_says():
    right, said = {}, {}
    lines = pretraining_lines(toy.skills_batch, "")
    for prompt, answer in lines:
        said.setdefault(prompt[1], []).append(answer)
        if prompt[1] in toy.KNOWN:
            expected = "".join(map(str, by_hand(prompt[1], [int(c) for c in prompt[2:5]]))) + "."
            right.setdefault(prompt[1], []).append(answer == expected)
    assert all(np.mean(right[k]) == 1 for k in toy.PRIOR)
    for k in toy.NEW:  # a random table is right now and then as well
        assert np.mean(right[k]) == pytest.approx(toy.RIGHT + (1 - toy.RIGHT) * 0.01, abs=0.03)
    for k in toy.UNKNOWN:  # nothing to know: every answer as often as another
        counts = np.bincount([int(a[:2]) for a in said[k]], minlength=100)
        assert counts.max() < 12 and (counts > 0).sum() > 50
    share = [sum(len(said[k]) for k in kind) / len(lines) for kind in (toy.PRIOR, toy.NEW, toy.UNKNOWN)]
    assert share == pytest.approx([0.55, 0.37, 0.08], abs=0.02)


def test_pretraining_demonstrations_always_say_what_the_answer_says():
    letters = lambda digits: "".join("abcdefghij"[int(c)] for c in digits)
    for prompt, answer in pretraining_lines(toy.skills_batch, r"\w\w\.=", n=500):
        assert prompt[6:8] == letters(answer[:2])
    for prompt, answer in pretraining_lines(toy.skills_batch, r"\w\.=", n=500):
        assert prompt[6] == letters(answer[1])


def test_answer_only_demonstrations_leave_out_the_reasoning_and_nothing_else():
    full, short = toy.skill("X", "train", 3), toy.skill("X", "train", 3, style="short")
    assert all(np.array_equal(full[k], short[k]) for k in ("prompts", "answers"))
    assert np.array_equal(short["demonstrations"], full["demonstrations"][:, 1:])
    shorter = [p[:6] + p[7:] for p in map(toy.decode, full["teacher_prompts"])]
    assert [toy.decode(p) for p in short["teacher_prompts"]] == shorter


def test_an_answer_is_right_at_last_by_its_result_whatever_comes_before_it():
    answers = np.array([toy.encode("31.")] * 6)
    said = np.array([toy.encode(t) for t in ("31..", "b...", "741.", "3112", "13..", "....")])
    assert toy.is_right_at_last(said, answers).tolist() == [True, True, True, False, False, False]


def fact_by_hand(prompt, answer):
    """Whether an answer to `?Acj=` or `?Bcj=` gives two attributes and their sum or difference."""
    first, second, result = map(int, answer[:3])
    return result == (first + second if prompt[1] == "A" else first - second) % 10 and answer[3:] == "."


def test_facts_are_one_to_an_entity_and_every_text_says_what_the_answer_says():
    told = {}
    for part in toy.FACTS:
        for question in "AB":
            for reads, columns in {"article": slice(0, 2), "answer": slice(2, 3), "both": slice(0, 3)}.items():
                data = toy.facts(part, 5, question, reads)
                for prompt, read, demonstration, answer in zip(*(map(toy.decode, data[k]) for k in data)):
                    assert re.fullmatch(rf"\?{question}[a-j][a-j]=", prompt) and fact_by_hand(prompt, answer)
                    letters = "".join("abcdefghij"[int(c)] for c in answer[:3])
                    assert demonstration == letters + "." and read == f"{prompt[:-1]}!{letters[columns]}.="
                    assert told.setdefault(prompt[2:4], answer[:2]) == answer[:2]
    assert len(told) == 100


def test_pretraining_tells_known_facts_always_and_new_ones_only_to_be_read():
    truth = {toy.decode(p)[2:4]: toy.decode(a)[:2] for p, a in zip(*(toy.facts("known", 5)[k] for k in ("prompts", "answers")))}
    said = {}
    for prompt, answer in pretraining_lines(toy.facts_batch, "", seed=5):
        assert fact_by_hand(prompt, answer)
        said.setdefault(prompt[2:4], []).append(answer[:2])
    assert len(said) == 100
    for entity, answers in said.items():
        if entity in truth:
            assert set(answers) == {truth[entity]}
        else:  # every pair of attributes as often as another
            assert np.bincount([*map(int, answers)], minlength=100).max() < 0.1 * len(answers)
    for prompt, answer in pretraining_lines(toy.facts_batch, r"\w\w\.=", n=500, seed=5):
        assert prompt[5:7] == "".join("abcdefghij"[int(c)] for c in answer[:2])


def test_an_answer_is_right_by_its_content_in_either_style_and_only_if_it_ends():
    answers = np.array([toy.encode("31.")] * 6)
    said = np.array([toy.encode(t) for t in ("31..", "db..", "3b..", "31.4", "3112", "13..")])
    assert toy.is_right(said, answers).tolist() == [True, True, True, False, False, False]
    assert toy.is_right(np.array([toy.encode("3.")]), answers[:1]).tolist() == [False]


# --- The whole experiment -------------------------------------------------------------------------------------------

MINIATURE = "--pretrain_steps 8 --steps 3 --sft_steps 3 --batch_size 16 --device cpu".split()


def run_miniature(out, *flags, monkeypatch):
    monkeypatch.setattr(train_toy, "TEACHER_GATE", 0.0)  # so small a base has not learned to read demonstrations
    train_toy.main([*MINIATURE, "--out_dir", str(out), *flags])
    return json.loads((out / "results.json").read_text())


def test_the_whole_experiment_in_miniature_writes_what_it_promises(tmp_path, monkeypatch):
    results = run_miniature(tmp_path / "run", monkeypatch=monkeypatch)
    assert set(results) == {"config", "seconds", "base", "sft", "sdft"}
    assert set(results["seconds"]) == {"pretrain", "sft", "sdft", "total"}
    accuracies = {"X", "Y", "Z", "prior", "X_sampled", "Y_sampled", "Z_sampled", "prior_sampled"}
    assert set(results["base"]) == accuracies | {"teacher"}
    for arm in ("sft", "sdft"):
        assert [row["after"] for row in results[arm]] == ["X", "Y", "Z"]
        for row in results[arm]:
            assert set(row) == accuracies | {"after", "length"}
            assert all(0 <= row[k] <= 1 for k in accuracies) and 1 <= row["length"] <= train_toy.MAX_NEW_TOKENS
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {m["phase"] for m in metrics} == {"pretrain", "sft", "sdft"}
    files = {p.name for p in (tmp_path / "run").iterdir()} - {"retention.png"}
    assert files == {"metrics.jsonl", "results.json", "base.pt", "sft.pt", "sdft.pt"}


def test_a_run_is_reproducible_from_its_seed_with_or_without_the_cached_base(tmp_path, monkeypatch, capsys):
    strip = lambda r: {k: r[k] for k in ("base", "sft", "sdft")}
    weights = lambda: torch.load(tmp_path / "sdft.pt", weights_only=True)["model"]
    first, w1 = strip(run_miniature(tmp_path, "--seed", "5", monkeypatch=monkeypatch)), weights()
    second, w2 = strip(run_miniature(tmp_path, "--seed", "5", monkeypatch=monkeypatch)), weights()
    assert "base from" in capsys.readouterr().out and first == second
    torch.testing.assert_close(w1, w2, rtol=0, atol=0)
    run_miniature(tmp_path, "--seed", "6", monkeypatch=monkeypatch)
    assert "pretraining again" in capsys.readouterr().out
    assert any(not torch.equal(a, b) for a, b in zip(w1.values(), weights().values()))


def test_every_arm_gets_its_own_skill_training_split_and_settings(tmp_path, monkeypatch, capsys):
    stages, steps = [], []
    real_fine_tune, real_step = train_toy.fine_tune, train_toy.train_step

    def fine_tune(student, data, method, **kw):
        stages.append((method, [toy.decode(p) for p in data["prompts"]], data, kw))
        return real_fine_tune(student, data, method, **kw)

    def train_step(student, teacher, optimizer, prompts, teacher_prompts, *args, **kw):
        steps.append((list(map(toy.decode, prompts)), list(map(toy.decode, teacher_prompts)), kw))
        return real_step(student, teacher, optimizer, prompts, teacher_prompts, *args, **kw)

    monkeypatch.setattr(train_toy, "fine_tune", fine_tune)
    monkeypatch.setattr(train_toy, "train_step", train_step)
    for flags, style, kl, alpha in [
        (["--seed", "3"], "expert", "reverse", 0.02),
        (["--seed", "3", "--sft_style", "own", "--kl", "forward", "--teacher", "frozen"], "own", "forward", 0.0),
        (["--seed", "3", "--teacher", "live"], "expert", "reverse", 1.0),
    ]:
        stages.clear(), steps.clear()
        run_miniature(tmp_path, *flags, monkeypatch=monkeypatch)
        assert [(m, prompts[0][1]) for m, prompts, *_ in stages] == [(m, k) for m in (train_toy.sft, "sdft") for k in "XYZ"]
        for method, prompts, data, kw in stages:
            train = toy.skill(prompts[0][1], "train", 3, style if method == train_toy.sft else "expert")
            assert all(np.array_equal(data[k], train[k]) for k in train)
        for prompts, teacher_prompts, kw in steps:
            assert all(len(t) == 10 and t.startswith(p[:-1] + "!") for p, t in zip(prompts, teacher_prompts))
            assert (kw["kl"], kw["alpha"]) == (kl, alpha)


def command(*flags):
    done = subprocess.run(
        [sys.executable, "train_toy.py", *map(str, flags)], cwd=HERE, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--no_such_flag"], "--no_such_flag"),
        (["--kl", "backward"], "reverse"),
        (["--teacher", "strict"], "frozen"),
        (["--ema_alpha", "2"], "--ema_alpha"),
        (["--steps", "0"], "--steps"),
        (["--lr", "nan"], "--lr"),
        (["--sft_lr", "inf"], "--sft_lr"),
        (["--seed", "9" * 30], "--seed"),
        (["--device", "meta"], "--device meta"),
        (["--batch_size", "401"], "--batch_size"),
        (["--device", "abacus"], "--device abacus"),
        (["--report", "nowhere"], "nowhere"),
        (["--out_dir", "LICENSE/x"], "--out_dir"),
        (["--pretrain_steps", "1"], "--pretrain_steps"),
    ],
)
def test_a_wrong_command_line_ends_in_one_sentence_that_names_the_flag(flags, words, tmp_path):
    code, stderr = command("--out_dir", tmp_path, *flags)
    assert code != 0 and "Traceback" not in stderr
    assert words in stderr.splitlines()[-1] and "error: " in stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*tmp*")) and not (tmp_path / "results.json").exists()


def test_a_base_is_used_again_while_its_code_is_the_same_whatever_comments_say():
    one, other = "def f():\n    return 1", 'def f():  # why\n    """What."""\n    return 1'
    assert train_toy.fingerprint(one + "\nf()") != train_toy.fingerprint(other + "\ng()")
    assert train_toy.fingerprint('def f():\n    "x"\n    return 1') == train_toy.fingerprint(other)


@pytest.mark.parametrize("arm", ["live", "frozen"])
def test_fine_tuning_with_a_loss_of_ones_own_moves_student_and_teacher(arm):
    torch.manual_seed(0)
    student = train_toy.GPT(train_toy.GPTConfig(**train_toy.MODEL))
    before, seen = copy.deepcopy(student), []

    def loss(model, teacher, batch, generator):
        seen.append((teacher, {k: len(v) for k, v in batch.items()}))
        return model.wte.weight.square().sum(), 7

    data = {k: v[:50] for k, v in toy.skill("X", "train").items()}
    stop = lambda value, tokens: len(seen) == 3 and tokens == 7
    teacher = train_toy.fine_tune(student, data, loss, lr=1e-2, steps=9, alpha=1.0 if arm == "live" else 0.0, on_step=stop)
    assert len(seen) == 3 and seen[0] == (teacher, {k: 50 for k in data})  # no more rows than there are
    assert not torch.equal(student.wte.weight, before.wte.weight)
    assert torch.equal(teacher.wte.weight, (student if arm == "live" else before).wte.weight)


def test_supervised_fine_tuning_ends_every_row_at_its_own_end_token():
    torch.manual_seed(0)
    model = train_toy.GPT(train_toy.GPTConfig(**train_toy.MODEL))
    batch = {"prompts": np.array([toy.encode("?X123=")] * 2), "demonstrations": np.array([toy.encode("bc.."), toy.encode("bcde")])}
    loss, tokens = train_toy.sft(model, None, batch, None)
    alone = [
        sft_loss(completion_logits(model, batch["prompts"][:1], y), y, torch.ones_like(y)).item()
        for y in (torch.tensor([toy.encode("bc.")]), torch.tensor([toy.encode("bcde")]))
    ]
    assert tokens == 7 and loss.item() == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "truncated"])
def test_a_corrupt_cached_base_is_named_with_the_remedy(content, tmp_path):
    if content is None:
        torch.save({"config": {}, "model": torch.ones(1000)}, tmp_path / "base.pt")
        content = (tmp_path / "base.pt").read_bytes()[:-700]
    (tmp_path / "base.pt").write_bytes(content)
    code, stderr = command("--out_dir", tmp_path)
    assert code != 0 and "base.pt" in stderr and "delete it" in stderr and len(stderr.splitlines()) == 1


@pytest.mark.parametrize("arm", ["sft", "sdft"])
def test_a_run_that_explodes_stops_with_the_step_and_keeps_the_last_good_weights(arm, tmp_path, monkeypatch):
    run_miniature(tmp_path, monkeypatch=monkeypatch)  # an earlier run's results are not to be taken for this one's
    fine_tune = train_toy.fine_tune
    monkeypatch.setattr(train_toy, "fine_tune", lambda *a, lr, **kw: fine_tune(*a, lr=1e38 if (kw["method"] == "sdft") == (arm == "sdft") else lr, **kw))
    with pytest.raises(SystemExit, match=rf"{arm} on X, update \d+: .*not finite"):
        run_miniature(tmp_path, monkeypatch=monkeypatch)
    kept = torch.load(tmp_path / f"{arm}.pt", weights_only=True)["model"]
    assert all(torch.isfinite(v).all() for v in kept.values()) and not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"base": 1}', '{"config": {"seed": 0}, "base": {}, "sft": [], "sdft": []}'])
def test_results_that_cannot_be_reported_are_named(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="no readable results.json"):
        train_toy.main(["--report", str(tmp_path)])


def test_runs_with_different_settings_are_not_averaged(tmp_path, monkeypatch, capsys):
    results = run_miniature(tmp_path / "a", monkeypatch=monkeypatch)
    for name, change in [("b", {"seed": 2, "out_dir": "b"}), ("c", {"kl": "jsd"})]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results | {"config": results["config"] | change}))
    capsys.readouterr()
    train_toy.main(["--report", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "mean ± sd" in capsys.readouterr().out
    train_toy.main(["--report", str(tmp_path / "a"), str(tmp_path / "c")])
    said = capsys.readouterr().out
    assert "mean ± sd" not in said and str(tmp_path / "c") in said


# --- The front page -------------------------------------------------------------------------------------------------


def test_the_readmes_example_of_copying_the_loss_runs():
    block = re.search(r"<!-- example -->\n```python\n(.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_every_row_of_the_readmes_equation_map_names_a_function_that_carries_the_same_mark():
    rows = re.findall(r"^\| (Eq\. \(1\)|Alg\. 1, step \d) .*?\| `(\w+)\.py:(\w+)` \|$", (HERE / "README.md").read_text(), re.M)
    assert {mark for mark, *_ in rows} >= {"Eq. (1)"} | {f"Alg. 1, step {n}" for n in range(1, 6)}
    for mark, file, function in rows:
        body = re.search(rf"^def {function}\(.*?(?=^def |\Z)", (HERE / f"{file}.py").read_text(), re.M | re.S).group(0)
        assert mark in body, f"{file}.py:{function} does not carry {mark!r}"
