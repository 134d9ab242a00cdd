"""Each trick of gpt2/fast.py equals the textbook function of sdft.py. CPU only, offline."""

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
from gpt2 import fast, lora, settings
from gpt2.conftest import small_gpt
from gpt2.data import pad_right
from sdft import completion_logits, left_pad, sdft_loss

PROMPTS = [[3, 5, 7], [11], [13, 17, 19, 23]]
TEACHER_PROMPTS = [[29, 31, *p] for p in PROMPTS]
EVEN = [[3, 5], [7, 11]]
EOS = 96
CPU = torch.device("cpu")


def tiny(seed=0, ends=3.0):
    """Vocabulary 97, whose last token ends a response after four or five tokens on average."""
    return small_gpt(seed, ends=ends, block_size=32, vocab_size=97)


def streams(seed=0, n=3):
    return fast.row_generators(seed, 0, range(n), CPU)


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
    if temperature == 1 and n == 3:
        assert len(set(mask.sum(1).tolist())) > 1  # rows of different lengths


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
    """What is not packed is the student's own, or its copy in bfloat16; and of a copy's matrices
    only the embeddings are there twice.
    """
    student = tiny()
    theirs = dict(student.named_parameters())
    for can_pack in (True, False):
        if not can_pack:
            monkeypatch.setattr(fast.PackedLinear, "can_hold", lambda weight: False)
        for dtype in (torch.float32, torch.bfloat16):
            model = fast.RolloutGPT.of(student, dtype)
            ours = dict(model.named_parameters())
            packed = {k for k, w in theirs.items() if w.dim() == 2 and k[:2] == "h."}
            assert theirs.keys() - ours.keys() == (packed if model.packed_head else set())
            for name, w in ours.items():
                assert torch.equal(w, theirs[name].to(dtype)) and not w.requires_grad
                assert (w.data_ptr() == theirs[name].data_ptr()) == (dtype == torch.float32)
    assert all(p.requires_grad for p in student.parameters())


def test_hidden_states_give_the_textbook_logits():
    """lm_head of `completion_hidden` is `sdft.completion_logits`."""
    model, completions = tiny(), torch.tensor([[1, 2], [3, 4], [5, 6]])
    logits = model.lm_head(fast.completion_hidden(model, PROMPTS, completions))
    torch.testing.assert_close(logits, completion_logits(model, PROMPTS, completions))


# --- The loss in chunks ---------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunked_loss_equals_the_textbook_loss(divergence, chunk):
    """Loss, divergences and both gradients; ragged rows, one of them without a token."""
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    teacher = torch.randn(4, 5, 6), torch.randn(50, 6)  # of another width
    mask = torch.arange(5) < torch.tensor([[5], [2], [0], [3]])
    plain, info = sdft_loss(F.linear(hidden, head), F.linear(*teacher), mask, divergence)
    expected = torch.autograd.grad(3 * plain, (hidden, head))
    loss, chunked = fast.chunked_sdft_loss(hidden, head, *teacher, mask, divergence, chunk)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunked["divergence"], info["divergence"], rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(3 * loss, (hidden, head))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)


def test_without_tokens_loss_and_gradient_are_0():
    """A batch whose every response is shorter than skip_tokens."""
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss, info = fast.chunked_sdft_loss(hidden, head, hidden, head, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not head.grad.any()
    assert info["divergence"].shape == (2, 3)


def test_gradients_go_where_they_are_wanted():
    """None to the teacher or a frozen head, and none is kept after the backward pass."""
    student, teacher = torch.randn(2, 2, 3, 4, requires_grad=True).unbind()
    student.retain_grad()
    teacher.retain_grad()
    head, teacher_head = torch.randn(9, 4), torch.randn(9, 4, requires_grad=True)
    loss, _ = fast.chunked_sdft_loss(student, head, teacher, teacher_head, torch.ones(2, 3))
    node = loss.grad_fn
    assert node.grads[0] is not None and node.grads[1] is None
    loss.backward()
    assert student.grad.any() and teacher.grad is None and teacher_head.grad is None
    assert node.grads is None


@pytest.mark.parametrize("wrong", [dict(divergence="both"), dict(chunk=0)])
def test_chunked_loss_names_a_wrong_argument(wrong):
    """Also if there is no token to compute."""
    h, w = torch.randn(1, 2, 4), torch.randn(9, 4)
    for mask in (torch.ones(1, 2), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fast.chunked_sdft_loss(h, w, h, w, mask, **wrong)
    with pytest.raises(ValueError, match="mask"):
        fast.chunked_sdft_loss(h, w, h, w, torch.ones(2, 1))


def test_bfloat16_gradients_are_summed_in_float32():
    """16 x 64 tokens, one a chunk: summed in bfloat16 the error is four times the plain one."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(2, 16, 64, 8, dtype=torch.bfloat16)
    head, mask = torch.randn(50, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(16, 64)

    def gradient(dtype):
        logits = [F.linear(h.to(dtype), head.to(dtype)) for h in (hidden, teacher)]
        loss, _ = sdft_loss(logits[0], logits[1].detach(), mask)
        return torch.autograd.grad(loss, head)[0].double()

    exact, plain = gradient(torch.float64), gradient(torch.bfloat16)
    loss, _ = fast.chunked_sdft_loss(hidden, head, teacher, head, mask, chunk=1)
    (chunked,) = torch.autograd.grad(loss, head)
    assert (chunked - exact).norm() < 1.5 * (plain - exact).norm()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_chunked_loss_holds_one_chunk_of_logits():
    """The memory that it is there to save."""
    B, C, D, V, chunk = 4, 16, 8, 500, 8
    hidden = torch.randn(B, C, D, requires_grad=True)
    head, mask = torch.randn(V, D, requires_grad=True), torch.ones(B, C)
    with Largest() as chunked:
        fast.chunked_sdft_loss(hidden, head, hidden, head, mask, chunk=chunk)[0].backward()
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
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), counts:
            hidden = model.hidden(tokens, n_pad)
            hidden.square().sum().backward()
        blocks = {name: p.grad for name, p in model.h.named_parameters() if p.requires_grad}
        seen.append((counts, hidden, blocks))
    for name, grad in seen[0][2].items():
        assert torch.equal(grad, seen[1][2][name]), name
    assert torch.equal(seen[0][1], seen[1][1])
    plain, lean = (counts for counts, *_ in seen)
    assert lean.products == plain.products > 0 and lean.gelus == 2 * plain.gelus > 0


def test_a_step_has_one_dense_gradient_of_the_tied_weight():
    """The largest tensor: (V, D), and the embedding's gradient has only the rows it read."""
    student, teacher = fast.lean(tiny()), tiny(1)
    loss = student.hidden(torch.tensor([[3, 5, 3]])).sum()
    loss.backward()
    assert student.wte.weight.grad.is_sparse and student.wte.weight.grad._nnz() == 3
    student.zero_grad()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(student.wte.weight.grad.layout))
    models = student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 9, EOS
    fast.train_step(*models, generators=streams())
    assert seen == [torch.strided]  # what AdamW and the processes' mean need


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
print((used - bench.memory("VmRSS")) / 2**20)
"""
    others = ("LD_PRELOAD", "MALLOC_", "GLIBC_TUNABLES")  # other allocators, other settings
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    freed = {}
    for how in ("plain", "keep"):
        run = [sys.executable, "-c", code, how]
        freed[how] = float(subprocess.run(run, stdout=-1, text=True, check=True, env=env).stdout)
    assert freed["plain"] > 200 and freed["keep"] < 50


# --- Steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [dict(), dict(micro_batch=2), dict(micro_batch=1, chunk=4)])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(divergence="forward", skip_tokens=2, alpha=0.5),
        dict(divergence="jsd", temperature=0.7, grad_clip=0.01, alpha=0.0),
    ],
    ids=["defaults", "forward", "jsd"],
)
def test_step_equals_the_textbook_step(size, options, textbook_draws):
    """Tokens, masks, loss, divergences, student and teacher; SGD, as Adam hides a wrong scale."""
    results = []
    for step in (sdft.train_step, fast.train_step):
        student, teacher = tiny(0), tiny(1).requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        inputs = student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 9, EOS
        textbook_draws()
        if step is sdft.train_step:
            loss, info = step(*inputs, **options)
        else:
            fast.lean(student)
            loss, info = step(*inputs, generators=streams(), **options, **size)
        results.append((loss, info, student.state_dict(), teacher.state_dict()))
    lengths = results[0][1]["mask"].sum(1).tolist()
    assert len(set(lengths)) == 3  # a wrong weight of rows or tokens would not show otherwise
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(results[0][2]["wte.weight"], tiny(0).wte.weight)


@pytest.mark.parametrize("micro_batch", [None, 2, 1])
@pytest.mark.parametrize("block_size", [32, 9], ids=["fits", "is split"])
def test_sft_step_equals_the_textbook_update(micro_batch, block_size):
    """`sdft.sft_loss` of all rows at once, then clip_and_step; demonstrations of 2, 5 and 3."""
    demonstrations = [[40, EOS], [41, 42, 43, 44, EOS], [45, 46, EOS]]
    results = []
    for fits in (32, block_size):
        student = tiny()
        student.config.block_size = fits
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        if fits == 32 and not results:
            tokens, mask = pad_right(demonstrations, EOS, CPU)
            loss = sdft.sft_loss(completion_logits(student, PROMPTS, tokens), tokens, mask)
            loss.backward()
            sdft.clip_and_step(student, optimizer, loss.item(), 0.3)
            results.append((loss.item(), student.state_dict()))
        else:
            fast.lean(student)
            how = EOS, 0.3, micro_batch
            loss, info = fast.sft_step(student, optimizer, PROMPTS, demonstrations, *how)
            results.append((loss, student.state_dict()))
            assert info["mask"].sum(1).tolist() == [2, 5, 3]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_bfloat16_copy_samples_and_student_is_scored():
    """The copy has the student's weights of that step; loss and gradient are float32's."""
    student, teacher = tiny(0), tiny(1).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for seed in range(2):
        before, teacher_before = copy.deepcopy(student), copy.deepcopy(teacher)
        models = student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 9, EOS
        how = dict(rollout_dtype=torch.bfloat16, generators=streams(seed))
        loss, info = fast.train_step(*models, **how)
        half = fast.RolloutGPT.of(before, torch.bfloat16)
        completions, mask = fast.rollout(half, PROMPTS, 9, EOS, generators=streams(seed))
        assert torch.equal(info["completions"], completions) and torch.equal(info["mask"], mask)
        given = PROMPTS, TEACHER_PROMPTS, completions, mask
        expected, _ = sdft.distill_loss(before, teacher_before, *given)
        assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["bfloat16"], ["bfloat16", "float32"], ["auto", "bfloat16"]])
def test_each_phase_runs_in_the_dtype_asked_for(flags, monkeypatch):
    """--dtype is that of the scoring, --rollout_dtype of the rollout; weights stay float32."""
    names = "--dtype", "--rollout_dtype"
    argv = [word for pair in zip(names, flags) for word in pair]
    args, _ = settings.parse_args("", ["--out_dir", "unused", *argv])
    student, teacher = tiny(), tiny(1).requires_grad_(False)
    optimizer, seen = settings.make_optimizer(student, args), {"scoring": set(), "rollout": set()}

    def spy(phase, c_attn):
        c_attn.register_forward_hook(lambda *call: seen[phase].add(call[2].dtype))

    def rollout(model, *rest):
        spy("rollout", model.h[0].attn.c_attn)
        return roll_out(model, *rest)

    roll_out = fast.rollout
    monkeypatch.setattr(fast, "rollout", rollout)
    spy("scoring", student.h[0].attn.c_attn)
    models = student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 5, EOS
    with settings.autocast(args, CPU):
        how = dict(rollout_dtype=settings.rollout_dtype(args, CPU), generators=streams())
        fast.train_step(*models, **how)
    half = ["bfloat16" in (flags[:1] or [""]), "bfloat16" in (flags[-1:] or [""])]
    dtypes = [{torch.bfloat16 if h else torch.float32} for h in half]
    assert [seen["scoring"], seen["rollout"]] == dtypes
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_autocast_keeps_every_gradient_in_float32():
    """A cast weight cached under no_grad would leave a weight without a gradient."""
    steps = []
    for dtype in ("float32", "bfloat16"):
        flags = ["--out_dir", "unused", "--dtype", dtype, "--rollout_dtype", "float32"]
        args, _ = settings.parse_args("", flags)
        student, teacher = tiny(ends=0.0), tiny(1).requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        models = student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 9, EOS
        with settings.autocast(args, CPU):
            fast.train_step(*models, generators=streams(), grad_clip=1e6)
        moved = zip(student.named_parameters(), tiny(ends=0.0).parameters())
        steps.append({name: after.detach() - before.detach() for (name, after), before in moved})
    for name, exact in steps[0].items():
        assert exact.dtype == steps[1][name].dtype == torch.float32 and steps[1][name].any()
        atol = 0.1 * exact.abs().max().item()
        torch.testing.assert_close(steps[1][name], exact, rtol=0, atol=atol)


def test_fused_adamw_makes_the_plain_updates():
    """PyTorch's reference loop, with weight decay."""
    args, _ = settings.parse_args("", "--out_dir x --lr 0.01 --weight_decay 0.1".split())
    ours, plain = tiny(), tiny()
    fused, how = settings.make_optimizer(ours, args), dict(weight_decay=0.1, foreach=False)
    assert fused.defaults["fused"]
    for optimizer in (fused, torch.optim.AdamW(plain.parameters(), lr=0.01, **how)):
        torch.manual_seed(0)
        for _ in range(3):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
