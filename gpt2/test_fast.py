"""Each trick of gpt2/fast.py equals the textbook function of sdft.py, on a GPU too where one is."""

import pytest
import torch
import torch.nn.functional as F

import sdft
from gpt2 import fast
from gpt2.conftest import same, small_gpt
from sdft import completion_logits, left_pad

PROMPTS = [[3, 5, 7], [11], [13, 17, 19, 23]]
TEACHER_PROMPTS = [[29, 31, *p] for p in PROMPTS]
EOS = 96
CPU = torch.device("cpu")
TOKENS = torch.tensor([[2, 3, 4]])
DTYPES = [torch.float32, torch.bfloat16]


def tiny(seed=0, ends=3.0):
    """Vocabulary 97, whose last token ends a response after four or five tokens on average."""
    return small_gpt(seed, ends=ends, block_size=32, vocab_size=97)


def roles(device):
    """Student, teacher and an optimizer; SGD, as Adam would hide a wrong scale."""
    student, teacher = tiny(0).to(device), tiny(1).to(device).requires_grad_(False)
    return student, teacher, torch.optim.SGD(student.parameters(), lr=0.5)


def streams(device):
    return fast.row_generators(0, 0, range(3), device)


def watched(monkeypatch, module, name, note):
    """The list to which every call of a function adds what `note` says of its first input."""
    notes, call = [], getattr(module, name)
    spy = lambda x, *more, **options: notes.append(note(x)) or call(x, *more, **options)
    monkeypatch.setattr(module, name, spy)
    return notes


@pytest.fixture
def textbook_draws(monkeypatch, device):
    """Makes sdft.rollout draw what `streams` give, by `inverse_cdf`, which has its own oracle."""
    uniforms = [torch.rand(9, generator=g, device=device) for g in streams(device)]
    uniforms = iter(torch.stack(uniforms, 1))  # (9, B)
    multinomial = lambda probs, *_, **__: fast.inverse_cdf(probs, next(uniforms))[:, None]
    monkeypatch.setattr(torch, "multinomial", multinomial)


def test_streams_differ_by_seed_step_and_place():
    """And are the same each time; a stream that ignored one of them would repeat its samples."""
    first = lambda *key: [torch.rand(1, generator=g).item() for g in fast.row_generators(*key, CPU)]
    draws = [first(seed, step, range(3)) for seed in (0, 1) for step in (0, 1)]
    assert len({u for row in draws for u in row}) == 12
    assert first(1, 1, range(3)) == draws[3] and first(1, 1, [2]) == draws[3][2:]


def test_inverse_cdf_at_its_edges():
    """The first token whose cumulative probability exceeds u, none of probability 0."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0]).expand(5, -1)
    u = torch.tensor([0.0, 0.4999, 0.5001, 0.9999, 1 - 2**-24])
    assert fast.inverse_cdf(p, u).tolist() == [1, 1, 3, 5, 5]


def test_a_model_that_cannot_be_packed_decodes_the_same():
    """Under autocast, where the products are in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        model = fast.RolloutGPT(tiny())
        assert model(TOKENS).dtype == torch.bfloat16
    same(model(TOKENS), tiny()(TOKENS))


def test_rollout_in_bfloat16_decodes_what_the_student_computes():
    """Step by step with its cache, against one pass without, to bfloat16's rounding."""
    student, (tokens, n_pad) = tiny(), left_pad(PROMPTS, CPU)
    model, P = fast.RolloutGPT(student, torch.bfloat16), tokens.size(1)
    whole = torch.cat([tokens, TOKENS.expand(3, -1)], 1)
    cache = model.kv_cache(3, P + 3)
    assert cache.kv.dtype == torch.float32  # in bfloat16 attention is slow on a CPU
    with torch.no_grad():
        expected = student(whole, n_pad)[:, P - 1 :]
        logits = [model(whole[:, :P], n_pad, cache)[:, -1]]
        logits += [model(whole[:, t : t + 1], n_pad, cache)[:, -1] for t in range(P, P + 3)]
    close = dict(rtol=0.05, atol=0.05 * expected.std().item())
    same(torch.stack(logits, 1).float(), expected, **close)


def test_memory_is_saved(monkeypatch):
    """GELU is computed again for the backward pass; the embedding's gradient has 3 rows, not 97."""
    calls = watched(monkeypatch, F, "gelu", len)
    student = fast.save_memory(tiny())
    student.hidden(TOKENS).sum().backward()
    gradient = student.wte.weight.grad
    assert len(calls) == 2 * len(student.h) and gradient.is_sparse and gradient._nnz() == 3


OPTIONS = [dict(), dict(divergence="forward", skip_tokens=4, alpha=0.5)]
OPTIONS += [dict(divergence="jsd", temperature=0.7, grad_clip=0.01, alpha=0.0)]


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "forward", "jsd"])
def test_train_step_equals_the_textbook(micro_batch, options, device, textbook_draws, monkeypatch):
    """The rollout, loss, divergences, student and teacher, with at most 4 tokens' logits."""
    passes = watched(monkeypatch, fast, "chunked_sdft_loss", len)
    sizes = watched(monkeypatch, fast, "token_divergence", len)
    monkeypatch.setattr(fast, "CHUNK", 4)
    inputs = PROMPTS, TEACHER_PROMPTS, 9, EOS
    student, teacher, optimizer = roles(device)
    loss, info = sdft.train_step(student, teacher, optimizer, *inputs, **options)
    expected = loss, info, student.state_dict(), teacher.state_dict()
    assert len(set(info["mask"].sum(1).tolist())) == 3  # a wrong weight of rows would not show
    for change in (fast.save_memory, lambda model: model):
        student, teacher, optimizer = roles(device)
        ours = options | {"generators": streams(device), "micro_batch": micro_batch}
        loss, info = fast.train_step(change(student), teacher, optimizer, *inputs, **ours)
        seen = loss, info, student.state_dict(), teacher.state_dict()
        same(seen, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(seen[2]["wte.weight"], tiny(0).wte.weight.to(device))
    assert passes == 2 * ([2, 1] if micro_batch else [3])
    assert max(sizes) <= 4 and sum(sizes) == 2 * info["loss_mask"].sum()


SPLITS = [(None, 32, [3]), (2, 32, [2, 1]), (None, 9, [3]), (None, 8, [2, 1]), (3, 7, [1, 1, 1])]


@pytest.mark.parametrize("micro_batch, block_size, sizes", SPLITS)
def test_sft_step_equals_the_textbook_update(micro_batch, block_size, sizes, device, monkeypatch):
    """`sdft.sft_loss` of all rows at once, then clip_and_step; demonstrations of 2, 5 and 3.

    A pass has fewer rows where a long prompt and a long demonstration do not fit together.
    """
    passes = watched(monkeypatch, fast, "sft_loss", len)
    demonstrations = [[40, EOS], [41, 42, 43, 44, EOS], [45, 46, EOS]]
    textbook, _, optimizer = roles(device)
    tokens = [ids + [EOS] * (5 - len(ids)) for ids in demonstrations]
    tokens = torch.tensor(tokens, device=device)
    mask = (torch.arange(5) < torch.tensor([[2], [5], [3]])).to(device)
    loss = sdft.sft_loss(completion_logits(textbook, PROMPTS, tokens), tokens, mask)
    loss.backward()
    sdft.clip_and_step(textbook, optimizer, loss.item(), 0.3)
    student, _, optimizer = roles(device)
    fast.save_memory(student).config.block_size = block_size
    inputs = PROMPTS, demonstrations, EOS, 0.3, micro_batch
    total, info = fast.sft_step(student, optimizer, *inputs)
    same(info, {"completions": tokens, "mask": mask})
    assert total == pytest.approx(loss.item()) and passes == sizes
    same(student.state_dict(), textbook.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rollout_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_phase_runs_in_its_dtype(dtype, rollout_dtype, device, monkeypatch):
    """Autocast is of the scoring only. Every weight moves, and stays in float32."""
    student, teacher, optimizer = roles(device)
    sampled = watched(monkeypatch, fast, "rollout", lambda model: model(TOKENS.to(device)).dtype)
    scored = watched(monkeypatch, fast, "token_divergence", lambda logits: logits.dtype)
    options = dict(rollout_dtype=rollout_dtype, generators=streams(device))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        fast.train_step(student, teacher, optimizer, PROMPTS, TEACHER_PROMPTS, 9, EOS, **options)
    assert {*sampled} == {rollout_dtype} and {*scored} == {dtype}
    for after, before in zip(student.parameters(), tiny(0).parameters(), strict=True):
        assert after.dtype == torch.float32 and not after.cpu().equal(before)
