"""Each trick of gpt2/fast.py equals the textbook function of sdft.py. CPU only, offline."""

import collections
import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sdft
from gpt2 import fast, lora
from gpt2.conftest import small_gpt
from gpt2.data import pad_right
from sdft import completion_logits, left_pad, sdft_loss

PROMPTS = [[3, 5, 7], [11], [13, 17, 19, 23]]
TEACHER_PROMPTS = [[29, 31, *p] for p in PROMPTS]
EVEN = [[3, 5], [7, 11]]
EOS = 96
CPU = torch.device("cpu")
HALF = {torch.float32: False, torch.bfloat16: True}


def tiny(seed=0, ends=3.0):
    """Vocabulary 97, whose last token ends a response after four or five tokens on average."""
    return small_gpt(seed, ends=ends, block_size=32, vocab_size=97)


def roles():
    """Student, teacher and an optimizer; SGD, as Adam would hide a wrong scale."""
    student, teacher = tiny(0), tiny(1).requires_grad_(False)
    return student, teacher, torch.optim.SGD(student.parameters(), lr=0.5)


def streams(seed=0, n=3):
    return fast.row_generators(seed, 0, range(n), CPU)


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=HALF[dtype], cache_enabled=False)


@pytest.fixture
def textbook_draws(monkeypatch):
    """Makes sdft.rollout draw what `streams` give: torch.multinomial inverts the CDF in a loop."""

    def set_up(seed=0, n=3, columns=9):
        uniforms = torch.stack([torch.rand(columns, generator=g) for g in streams(seed, n)], 1)
        calls = iter(uniforms.tolist())

        def multinomial(probs, count, generator=None):
            tokens = []
            for row, u in zip(probs.double().tolist(), next(calls)):
                total, token = 0.0, -1
                while total <= u * sum(row):
                    token += 1
                    total += row[token]
                tokens.append([token])
            return torch.tensor(tokens)

        monkeypatch.setattr(torch, "multinomial", multinomial)

    return set_up


# --- Rollout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS, EVEN], ids=["ragged", "even"])
def test_rollout_equals_the_textbook_rollout(prompts, temperature, textbook_draws):
    """Same uniforms, same tokens and mask, from a plain GPT and from a RolloutGPT."""
    n, model = len(prompts), tiny()
    textbook_draws(n=n)
    expected, expected_mask = sdft.rollout(model, prompts, 9, EOS, temperature)
    for m in (model, fast.RolloutGPT.of(model)):
        completions, mask = fast.rollout(m, prompts, 9, EOS, temperature, streams(n=n))
        assert torch.equal(completions, expected) and torch.equal(mask, expected_mask)
    assert temperature != 1 or n == 2 or len(set(mask.sum(1).tolist())) > 1  # of various lengths


def test_a_row_does_not_depend_on_its_neighbours():
    """Its uniforms are its own stream's, and padding changes nothing."""
    model = tiny()
    together, mask = fast.rollout(model, PROMPTS, 12, EOS, generators=streams())
    for i, prompt in enumerate(PROMPTS):
        alone, m = fast.rollout(model, [prompt], 12, EOS, generators=streams()[i : i + 1])
        assert alone[0][m[0]].tolist() == together[i][mask[i]].tolist()


def test_streams_differ_by_seed_step_and_place():
    """And are the same each time; a stream that ignored one of them would repeat its samples."""

    def first(*key):
        return [torch.rand(1, generator=g).item() for g in fast.row_generators(*key, CPU)]

    draws = [first(seed, step, range(3)) for seed in (0, 1) for step in (0, 1)]
    assert len({u for row in draws for u in row}) == 12
    assert first(1, 1, range(3)) == draws[3] and first(1, 1, [2]) == draws[3][2:]


def test_tokens_come_as_often_as_probable():
    """χ² of 20,000 draws at 3 degrees of freedom; a token of probability 0 never comes."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(fast.inverse_cdf(p.expand(20000, -1), u), minlength=7).double()
    assert not counts[p == 0].any()
    expected = 20000 * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 16.3  # the 0.999 quantile


@pytest.mark.parametrize(
    "u, token", [(0.0, 1), (0.4999, 1), (0.5001, 3), (0.9999, 5), (1 - 2**-24, 5)]
)
def test_inverse_cdf_at_its_edges(u, token):
    """The first token whose cumulative probability exceeds u."""
    p = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0]])
    assert fast.inverse_cdf(p, torch.tensor([u])).item() == token


# --- The rollout model ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (4, 1, 8), (5, 70, 8)])
def test_packed_linear_equals_linear(shape, dtype):
    """With and without a bias, of strided rows too; in bfloat16 to the rounding of its results."""
    x, weight, bias = (torch.randn(n, dtype=dtype) for n in ((2, *shape), (20, 8), (20,)))
    if not fast.PackedLinear.can_hold(weight):
        pytest.skip("this processor multiplies no packed matrices in bfloat16")
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.05)
    for inputs in (x, x[0], x.transpose(0, -2)):
        for more in ((), (bias,)):
            y = fast.PackedLinear(weight, *more)(inputs)
            expected = F.linear(*(t.float() for t in (inputs, weight, *more)))
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), expected, **close)


def test_a_model_that_cannot_be_packed_decodes_the_same(monkeypatch):
    """On other devices, without oneDNN, and under autocast, where the products are in bfloat16."""
    model, tokens = tiny(), torch.tensor([[2, 3, 4]])
    with torch.autocast("cpu", torch.bfloat16):
        rollout_model = fast.RolloutGPT.of(model)
        assert rollout_model(tokens).dtype == torch.bfloat16
    torch.testing.assert_close(rollout_model(tokens), model(tokens))
    assert not fast.PackedLinear.can_hold(torch.empty(2, 2, device="meta"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fast.RolloutGPT.of(model).packed_head is None


@pytest.mark.parametrize("prompts", [PROMPTS, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rollout_model_decodes_what_the_student_computes(dtype, prompts):
    """Step by step with its cache, against one pass without; a bfloat16 one to its rounding."""
    student, (tokens, n_pad) = tiny(), left_pad(prompts, CPU)
    model, P = fast.RolloutGPT.of(student, dtype), tokens.size(1)
    whole = torch.cat([tokens, torch.tensor([[2, 3, 4]] * len(prompts))], 1)
    cache = model.kv_cache(len(prompts), P + 3)
    assert cache.kv.dtype == torch.float32  # in bfloat16 attention is slow on a CPU
    with torch.no_grad():
        expected = student(whole, n_pad)[:, P - 1 :]
        logits = [model(whole[:, :P], n_pad, cache)[:, -1]]
        logits += [model(whole[:, t : t + 1], n_pad, cache)[:, -1] for t in range(P, P + 3)]
    tolerance = dict(rtol=1e-5, atol=1e-5)
    if dtype == torch.bfloat16:
        tolerance = dict(rtol=0.05, atol=0.05 * expected.std().item())
    torch.testing.assert_close(torch.stack(logits, 1).float(), expected, **tolerance)


def test_rollout_model_shares_the_students_memory(monkeypatch):
    """But for what is packed: the matrices of the blocks, and a second copy of the embedding."""
    student = tiny()
    theirs = dict(student.named_parameters())
    blocks = {k for k, w in theirs.items() if w.dim() == 2 and k[:2] == "h."}
    for packed in (blocks, set()):
        model = fast.RolloutGPT.of(student)
        ours = dict(model.named_parameters())
        assert theirs.keys() - ours.keys() == packed and bool(packed) == bool(model.packed_head)
        for k, w in ours.items():
            assert w.data_ptr() == theirs[k].data_ptr() and not w.requires_grad
        monkeypatch.setattr(fast.PackedLinear, "can_hold", lambda weight: False)
    assert all(p.requires_grad for p in student.parameters())


def test_hidden_states_give_the_textbook_logits():
    """lm_head of `completion_hidden` is `sdft.completion_logits`."""
    model, completions = tiny(), torch.tensor([[1, 2], [3, 4], [5, 6]])
    logits = model.lm_head(fast.completion_hidden(model, PROMPTS, completions))
    torch.testing.assert_close(logits, completion_logits(model, PROMPTS, completions))


# --- The loss in chunks ---------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("lengths", [[5, 2, 0, 3], [0, 0, 0, 0]], ids=["ragged", "no tokens"])
def test_chunked_loss_equals_the_textbook_loss(divergence, chunk, lengths):
    """Loss, divergences and both gradients, all of them 0 without tokens; a teacher of any width."""
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    teacher = torch.randn(4, 5, 6), torch.randn(50, 6, requires_grad=True)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    loss, info = sdft_loss(F.linear(hidden, head), F.linear(*teacher), mask, divergence)
    expected = loss, info["divergence"], *torch.autograd.grad(loss, (hidden, head))
    chunked = fast.chunked_sdft_loss(hidden, head, *teacher, mask, divergence, chunk)
    torch.testing.assert_close(chunked, expected, rtol=1e-5, atol=1e-6)
    frozen = fast.chunked_sdft_loss(hidden, head.detach(), *teacher, mask, divergence, chunk)
    assert frozen[3] is None and torch.equal(frozen[2], chunked[2])


def test_gradients_are_summed_in_float32_under_autocast():
    """16 x 64 tokens, one a chunk: summed in bfloat16 the error would be several times as large."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(2, 16, 64, 8).bfloat16().float()
    head = torch.randn(50, 8).bfloat16().float().requires_grad_()
    mask = torch.ones(16, 64, dtype=torch.bool)

    def gradient(dtype):
        logits = [F.linear(h.to(dtype), head.to(dtype)) for h in (hidden, teacher)]
        return torch.autograd.grad(sdft_loss(logits[0], logits[1].detach(), mask)[0], head)[0]

    exact, plain = gradient(torch.float64), gradient(torch.bfloat16)
    with autocast(torch.bfloat16), Largest() as largest:
        *_, chunked = fast.chunked_sdft_loss(hidden, head, teacher, head, mask, chunk=1)
    assert chunked.dtype == torch.float32
    assert (chunked - exact).norm() < 1.5 * (plain - exact).norm()
    assert largest.casts[torch.bfloat16, 50 * 8] == 2  # each output layer once, not every chunk


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns; casts by dtype and size."""

    def __init__(self):
        super().__init__()
        self.elements, self.casts = 0, collections.Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
                self.casts[t.dtype, t.numel()] += f.overloadpacket.__name__ == "_to_copy"
        return out


def test_chunked_loss_holds_one_chunk_of_logits():
    """The memory that it is there to save."""
    B, C, D, V, chunk = 4, 16, 8, 500, 8
    hidden = torch.randn(B, C, D, requires_grad=True)
    head, mask = torch.randn(V, D, requires_grad=True), torch.ones(B, C, dtype=torch.bool)
    with Largest() as chunked:
        fast.chunked_sdft_loss(hidden, head, hidden, head, mask, chunk=chunk)
    with Largest() as plain:
        sdft_loss(F.linear(hidden, head), F.linear(hidden, head), mask)[0].backward()
    assert chunked.elements == max(chunk * V, V * D) and plain.elements == B * C * V


# --- Memory ---------------------------------------------------------------------------------------


RANK = 2


class Products(TorchDispatchMode):
    """How often matrices are multiplied, but for an adapter's, and how often GELU is computed."""

    def __init__(self):
        super().__init__()
        self.products = self.gelus = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.products += all(RANK not in a.shape for a in args)
        self.gelus += f.overloadpacket.__name__ == "gelu"
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("rank", [0, RANK], ids=["all weights", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lean_blocks_repeat_no_product_and_change_no_bit(dtype, rank):
    """Outputs and gradients; GELU runs twice in every block, a product never."""
    tokens, n_pad = left_pad(PROMPTS, CPU)
    seen = []
    for change in (lambda model: model, fast.lean):
        model = tiny()
        if rank:
            torch.manual_seed(0)
            for w in lora.trained(lora.add_adapters(model, rank, 16)).values():
                torch.nn.init.normal_(w, std=0.02)
        model, counts = change(model), Products()
        with autocast(dtype), counts:
            hidden = model.hidden(tokens, n_pad)
            hidden.square().sum().backward()
        blocks = {name: p.grad for name, p in model.h.named_parameters() if p.requires_grad}
        seen.append((counts, hidden, blocks))
    for name, grad in seen[0][2].items():
        assert torch.equal(grad, seen[1][2][name]), name
    assert torch.equal(seen[0][1], seen[1][1])
    plain, lean = (counts for counts, *_ in seen)
    assert lean.products == plain.products > 0 and lean.gelus == 2 * plain.gelus > 0


def test_the_embeddings_gradient_is_sparse_until_the_step():
    """It has only the rows that were read, so that a pass holds one dense (V, D)."""
    student, teacher, optimizer = roles()
    fast.lean(student).hidden(torch.tensor([[3, 5, 3]])).sum().backward()
    assert student.wte.weight.grad.is_sparse and student.wte.weight.grad._nnz() == 3
    student.zero_grad()
    layouts = []
    optimizer.register_step_pre_hook(lambda *_: layouts.append(student.wte.weight.grad.layout))
    contexts = PROMPTS, TEACHER_PROMPTS, 9, EOS
    fast.train_step(student, teacher, optimizer, *contexts, generators=streams())
    assert layouts == [torch.strided]  # what AdamW and the processes' mean need


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_freed_memory_is_kept():
    """256 MiB that were freed are there for the next tensor; plain glibc gives them back."""
    code = """
import sys, torch
from gpt2 import bench, fast
if sys.argv[1] == "keep":
    fast.keep_freed_memory()
x = torch.ones(2**26)
used = bench.memory("VmRSS")
del x
print((used - bench.memory("VmRSS")) )
"""
    others = ("LD_PRELOAD", "MALLOC_", "GLIBC_TUNABLES")  # other allocators, other settings
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    freed = {}
    for malloc in ("plain", "keep"):
        run = [sys.executable, "-c", code, malloc]
        printed = subprocess.run(run, stdout=subprocess.PIPE, check=True, env=env).stdout
        freed[malloc] = float(printed)
    assert freed["plain"] > 200 and freed["keep"] < 50


# --- Steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 2, 1])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(divergence="forward", skip_tokens=2, alpha=0.5),
        dict(divergence="jsd", temperature=0.7, grad_clip=0.01, alpha=0.0),
    ],
    ids=["defaults", "forward", "jsd"],
)
def test_train_step_equals_the_textbook_step(micro_batch, options, textbook_draws):
    """Tokens, masks, loss, divergences, student and teacher; lean or not."""
    inputs = PROMPTS, TEACHER_PROMPTS, 9, EOS
    textbook_draws()
    student, teacher, optimizer = roles()
    loss, info = sdft.train_step(student, teacher, optimizer, *inputs, **options)
    expected = loss, info, student.state_dict(), teacher.state_dict()
    assert len(set(info["mask"].sum(1).tolist())) == 3  # a wrong weight of rows would not show
    for change in (fast.lean, lambda model: model):
        student, teacher, optimizer = roles()
        fast_options = options | {"generators": streams(), "micro_batch": micro_batch}
        models = change(student), teacher, optimizer
        loss, info = fast.train_step(*models, *inputs, **fast_options)
        seen = loss, info, student.state_dict(), teacher.state_dict()
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(seen[2]["wte.weight"], tiny(0).wte.weight)


@pytest.mark.parametrize("micro_batch", [None, 2, 1])
@pytest.mark.parametrize("block_size", [32, 9], ids=["fits", "is split"])
def test_sft_step_equals_the_textbook_update(micro_batch, block_size):
    """`sdft.sft_loss` of all rows at once, then clip_and_step; demonstrations of 2, 5 and 3."""
    demonstrations = [[40, EOS], [41, 42, 43, 44, EOS], [45, 46, EOS]]
    textbook, _, optimizer = roles()
    tokens, mask = pad_right(demonstrations, EOS, CPU)
    loss = sdft.sft_loss(completion_logits(textbook, PROMPTS, tokens), tokens, mask)
    loss.backward()
    sdft.clip_and_step(textbook, optimizer, loss.item(), 0.3)
    student, _, optimizer = roles()
    fast.lean(student).config.block_size = block_size
    sizes = EOS, 0.3, micro_batch
    total, info = fast.sft_step(student, optimizer, PROMPTS, demonstrations, *sizes)
    assert total == pytest.approx(loss.item()) and torch.equal(info["mask"], mask)
    torch.testing.assert_close(student.state_dict(), textbook.state_dict(), rtol=1e-5, atol=1e-6)


def test_bfloat16_copy_samples_and_student_is_scored():
    """The copy has the student's weights of that step; loss and gradient are float32's."""
    student, teacher, optimizer = roles()
    for seed in range(2):
        before = copy.deepcopy((student, teacher))
        options = dict(rollout_dtype=torch.bfloat16, generators=streams(seed))
        contexts = PROMPTS, TEACHER_PROMPTS, 9, EOS
        loss, info = fast.train_step(student, teacher, optimizer, *contexts, **options)
        half = fast.RolloutGPT.of(before[0], torch.bfloat16)
        completions, mask = fast.rollout(half, PROMPTS, 9, EOS, generators=streams(seed))
        assert torch.equal(info["completions"], completions) and torch.equal(info["mask"], mask)
        expected, _ = sdft.distill_loss(*before, PROMPTS, TEACHER_PROMPTS, completions, mask)
        assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("rollout_dtype", HALF, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_each_phase_runs_in_its_dtype(dtype, rollout_dtype, monkeypatch):
    """Autocast is of the scoring only. Every weight has a gradient, in float32, close to its own."""
    student, teacher, optimizer = roles()
    seen, roll_out = {"scoring": set(), "rollout": set()}, fast.rollout

    def watch(phase, model):
        linear = model.h[0].attn.c_attn  # Before the hook that makes its output float32.
        linear.register_forward_hook(lambda *call: seen[phase].add(call[2].dtype), prepend=True)

    def rollout(model, *rest):
        watch("rollout", model)
        return roll_out(model, *rest)

    monkeypatch.setattr(fast, "rollout", rollout)
    watch("scoring", student)
    contexts = PROMPTS, TEACHER_PROMPTS, 9, EOS
    options = dict(rollout_dtype=rollout_dtype, generators=streams(), grad_clip=1e6)
    with autocast(dtype):
        _, info = fast.train_step(student, teacher, optimizer, *contexts, **options)
    assert seen == {"scoring": {dtype}, "rollout": {rollout_dtype}}
    exact, teacher, _ = roles()
    scored = PROMPTS, TEACHER_PROMPTS, info["completions"], info["mask"]
    sdft.distill_loss(exact, teacher, *scored)[0].backward()
    for (name, after), before in zip(student.named_parameters(), exact.parameters()):
        step, size = before.detach() - after.detach(), 0.5 * before.grad.abs().max().item()
        assert after.dtype == torch.float32 and step.any(), name
        torch.testing.assert_close(step, 0.5 * before.grad, rtol=0, atol=0.1 * size + 1e-6)


def test_a_frozen_teacher_is_not_written_to():
    """It may be the base itself, which has no adapters."""
    base = tiny().requires_grad_(False)
    student = lora.add_adapters(lora.share(base), 2, 8.0)
    optimizer = torch.optim.SGD(lora.trained(student).values(), lr=0.5)
    contexts = PROMPTS, TEACHER_PROMPTS, 5, EOS
    for seed in range(2):
        fast.train_step(student, base, optimizer, *contexts, generators=streams(seed), alpha=0.0)
    torch.testing.assert_close(base.state_dict(), tiny().state_dict(), rtol=0, atol=0)
