"""What sdft.py and model.py guarantee, a test each, in the order of Algorithm 1.

Oracles are independent: torch.distributions, plain Python, a model without cache or padding.
"""

import json
import math
import pickle
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributions as D
from torch.testing import assert_close

import sdft
from model import GPT, GPT2_SIZES, GPTConfig
from sdft import completion_logits, rollout, sdft_loss, sft_loss, train_step

EOS, HERE = 0, Path(__file__).parent
README = (HERE / "README.md").read_text("utf-8")
PROMPTS = [[5, 3, 8], [7], [2, 9, 4, 11, 6], [1, 1]]  # ragged; 8 more tokens just fit
TEACHER_PROMPTS = [[5, 3, 8, 10, 2], [7, 1, 2, 3, 4, 5, 6], [2, 9, 4, 11, 6, 3], [1, 1, 9]]
all_divergences = pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
seeded = lambda seed: torch.Generator().manual_seed(seed)
STUDENT, TEACHER = 2 * torch.randn(2, 3, 4, 7, generator=seeded(0)).double()  # logits
# A response and its padding; two turns of an agent around a tool's; nothing that counts.
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
nll = lambda logits, y: -D.Categorical(logits=logits).log_prob(torch.as_tensor(y))


def tiny_gpt(seed=0, vocab_size=13, block_size=13, noise=0.3):
    """A GPT in float64 whose every weight matters: a dropped bias or LayerNorm shows."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=2, n_head=2, n_embd=16)).double()
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    return model


def alone(model, prompt, y):
    """The logits (len(y), V) that predict a response, of one row without padding."""
    return model(torch.tensor([[*prompt, *y]]))[0, len(prompt) - 1 : -1]


def uncached_rollout(model, prompts, n, temperature, generator):
    """Responses up to their first EOS; every row is read anew for every token."""
    ys = [[] for _ in prompts]
    while max(map(len, ys)) < n and not all(EOS in y for y in ys):
        logits = torch.stack([model(torch.tensor([x + y]))[0, -1] for x, y in zip(prompts, ys)])
        probs = (logits.float() / (temperature or 1)).softmax(-1)
        sampled = torch.multinomial(probs, 1, generator=generator)[:, 0]
        for y, token in zip(ys, sampled if temperature else probs.argmax(-1)):
            y += [] if EOS in y else [token.item()]
    return ys


def oracle(student, teacher, divergence):
    """The divergence of every token, (..., V) to (...)."""
    p, q = D.Categorical(logits=student), D.Categorical(logits=teacher)
    if divergence == "jsd":
        m = D.Categorical(probs=(p.probs + q.probs) / 2)
        return (D.kl_divergence(p, m) + D.kl_divergence(q, m)) / 2
    return D.kl_divergence(p, q) if divergence == "reverse" else D.kl_divergence(q, p)


# --- Alg. 1, lines 6 to 11: contexts, rollout, scoring ---


def test_teacher_context_is_the_papers_template():
    """An article, question, demonstration, request; the student reads the question only."""
    text = "Who?\n\nThis is an example for a response to the question:\nAnn.\n\nNow answer with"
    text += " a response of your own, including the thinking process:\n"
    assert sdft.teacher_context("Who?", "Ann.", "A lake.") == "A lake.\n\n" + text
    assert sdft.teacher_context("Who?", "Ann.", "") == sdft.teacher_context("Who?", "Ann.") == text
    assert sdft.student_context("Who?") == "Who?"


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 4], [5, 6], [7, 8]]])
def test_cached_rollout_equals_the_uncached_one(temperature, prompts):
    """A row ends with its first EOS, which counts; the rest of it is filled with EOS."""
    for seed in range(5):
        settings = tiny_gpt(seed), prompts, 8
        y, mask = rollout(*settings, EOS, temperature, seeded(seed))
        expected = uncached_rollout(*settings, temperature, seeded(seed))
        assert [row[m].tolist() for row, m in zip(y, mask)] == expected
        assert (y[~mask] == EOS).all() and mask.any(0).all()


def diverged():
    model = tiny_gpt()
    model.wpe.weight.grad = torch.full_like(model.wpe.weight, math.inf)
    return model


REFUSED = {
    "needs a prompt": lambda: rollout(tiny_gpt(), [], 6, EOS),
    "every prompt a token": lambda: rollout(tiny_gpt(), [[1], []], 6, EOS),
    "14 tokens, more than block_size=13": lambda: rollout(tiny_gpt(), [[1] * 8], 6, EOS),
    "14 tokens exceed": lambda: completion_logits(tiny_gpt(), [[1] * 14], torch.ones(1, 1)),
    "max_new_tokens must": lambda: rollout(tiny_gpt(), PROMPTS, 0, EOS),
    "or >= 0.01": lambda: rollout(tiny_gpt(), PROMPTS, 6, EOS, 1e-3),  # float32 would overflow
    "are not finite": lambda: rollout(tiny_gpt(noise=math.nan), PROMPTS, 6, EOS, 0),
    "'forward' or 'jsd'": lambda: sdft_loss(STUDENT, TEACHER, MASK, "backward"),
    r"mask \(4,\)": lambda: sdft_loss(STUDENT[0], TEACHER[0], MASK[0]),
    r"mask \(3, 3\)": lambda: sdft_loss(STUDENT, TEACHER, torch.ones(3, 3)),
    r"\(1, 4, 7\) must be": lambda: sdft_loss(STUDENT, TEACHER[:1], MASK),
    "float16 loses": lambda: sdft.ema_update(tiny_gpt().half(), tiny_gpt(), 0.1),
    "keep the teacher in float32": lambda: sdft.ema_update(tiny_gpt().bfloat16(), tiny_gpt(), 0.1),
    "loss nan, gradient": lambda: sdft.clip_and_step(tiny_gpt(), None, math.nan),  # before it steps
    "gradient norm inf": lambda: sdft.clip_and_step(diverged(), None, 1.0),
}


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_arguments_are_refused(words):
    """Each would otherwise broadcast, be truncated, or go on with NaN."""
    with pytest.raises((ValueError, FloatingPointError), match=words):
        REFUSED[words]()


# --- Alg. 1, line 14: the loss, Eq. (2), and what it has to do with Eq. (1) ---


@all_divergences
def test_loss_and_gradient_are_those_of_torch_distributions(divergence):
    """The mean over the tokens that count, then over all rows; a tool's turn has no gradient."""
    student = STUDENT.clone().requires_grad_()
    per_token = oracle(student, TEACHER, divergence) * MASK
    expected = (per_token[0].sum() / 3 + per_token[1].sum() / 2) / 3
    loss, info = sdft_loss(student, TEACHER, MASK, divergence)
    gradient, same = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    assert_close((loss, info["divergence"], gradient), (expected, per_token.detach(), same))
    assert torch.equal(gradient.any(2), MASK == 1)


@all_divergences
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_logits_give_exactly_zero_gradient(divergence, dtype):
    """Adam would turn rounding noise into full-sized steps. Teacher and info have no graph."""
    student = (5 * torch.randn(4, 6, 1000, generator=seeded(1))).to(dtype).requires_grad_()
    teacher = student.detach().clone().requires_grad_()
    loss, info = sdft_loss(student, teacher, torch.ones(4, 6), divergence)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()
    assert teacher.grad is None and not info["divergence"].requires_grad


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd", None])
def test_losses_are_computed_in_float32(divergence):
    """bfloat16 has 8 bits: a sum over a vocabulary would be off by percents."""
    of_sdft = lambda s, t: sdft_loss(s, t, MASK, divergence)[0]
    loss = of_sdft if divergence else lambda s, _: sft_loss(s, torch.ones_like(MASK), MASK)
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    exact = loss(student.double(), teacher.double()).item()
    assert loss(student, teacher).item() == pytest.approx(exact, rel=1e-5)
    extreme = (1e4 * student.float()).requires_grad_()
    loss(extreme, -1e4 * teacher.float()).backward()
    assert extreme.grad.isfinite().all()


def all_responses(n):
    """All y of n tokens; both roles' logits and log π(y); gradient; ∇ KL(π ‖ π_T) of Eq. (1)."""
    student, teacher = tiny_gpt(0, vocab_size=4), tiny_gpt(1, vocab_size=4)
    y = torch.cartesian_prod(*[torch.arange(4)] * n).view(-1, n)
    s = completion_logits(student, [[1, 2]] * len(y), y)
    t = completion_logits(teacher, [[3, 1, 2]] * len(y), y).detach()
    log_pi, log_pi_t = -nll(s, y).sum(1), -nll(t, y).sum(1)
    grad = lambda loss: torch.autograd.grad(loss, [*student.parameters()], retain_graph=True)
    flat = lambda loss: torch.cat([g.flatten() for g in grad(loss)])
    return y, s, t, log_pi, log_pi_t, flat, flat((log_pi.exp() * (log_pi - log_pi_t)).sum())


def test_reinforce_on_implicit_reward_descends_eq_1():
    """E_y[r(y) ∇ log π(y)] = -∇ KL(π ‖ π_T): RL without a reward model, Eqs. (3)-(6)."""
    y, student, teacher, log_pi, log_pi_t, gradient, of_eq_1 = all_responses(2)
    pi, reward = log_pi.exp().detach(), sdft.implicit_reward(student, teacher, y).sum(1)
    assert_close(gradient((pi * reward * log_pi).sum()), -of_eq_1)
    # A pitfall: E_y[∇ (log π(y) - log π_T(y))] is 0 whatever the teacher.
    pitfall = gradient((pi * (log_pi - log_pi_t)).sum())
    assert pitfall.abs().max() < 1e-9 and of_eq_1.abs().max() > 1e-3


@pytest.mark.parametrize("n", [1, 2])
def test_analytic_gradient_is_eq_2_and_biased(n):
    """A token's effect on later ones is ignored: ∇ Eq. (1) for responses of one token only."""
    y, student, teacher, log_pi, _, gradient, of_eq_1 = all_responses(n)
    pi = log_pi.exp().detach()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    slope = (log_p.exp() * (log_p - log_q)).detach()  # π_θ(v) log[π_θ(v) / π(v)]
    losses = [n * sdft_loss(s[None], t[None], y[:1] >= 0)[0] for s, t in zip(student, teacher)]
    analytic = gradient((pi * torch.stack(losses)).sum())
    assert_close(analytic, gradient((pi[:, None, None] * slope * log_p).sum()))  # Eq. (2)
    assert torch.allclose(analytic, of_eq_1, rtol=0.01, atol=1e-6) == (n == 1)


# --- Alg. 1, lines 16 and 17, and the whole step ---


@pytest.mark.parametrize("alpha", [0, 0.25, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_averages_weights_and_buffers(alpha, dtype):
    """φ ← α θ + (1 - α) φ; an integer is copied; α = 0 touches nothing, in any precision."""
    student = torch.nn.BatchNorm1d(3).to(dtype)
    teacher = torch.nn.BatchNorm1d(3).to(torch.float32 if alpha else torch.float16)
    for k, (t, s) in enumerate(zip(teacher.state_dict().values(), student.state_dict().values())):
        t.fill_(1), s.fill_(k + 11)
    sdft.ema_update(teacher, student, alpha)
    expected = [alpha * (k + 11) + (1 - alpha) for k in range(4)] + [15 if alpha else 1]
    assert [float(t.flatten()[0]) for t in teacher.state_dict().values()] == expected


@all_divergences
def test_train_step_is_algorithm_1_by_hand(divergence):
    """Two steps: gradients left over would show. SGD: Adam hides errors of scale."""
    student, teacher, generator = tiny_gpt(0), tiny_gpt(1), seeded(9)
    models = student, teacher, torch.optim.SGD(student.parameters(), lr=0.1)
    settings = {"alpha": 0.25, "temperature": 0.7, "grad_clip": 0.05, "skip_tokens": 1}
    settings |= {"divergence": divergence, "generator": seeded(9)}
    for _ in range(2):
        ys, loss = uncached_rollout(student, PROMPTS, 6, 0.7, generator), 0
        for x, xc, y in zip(PROMPTS, TEACHER_PROMPTS, ys):
            per_token = oracle(alone(student, x, y), alone(teacher, xc, y).detach(), divergence)
            loss += per_token[1:].sum() / max(1, len(y) - 1) / 4
        gradients = torch.autograd.grad(loss, [*student.parameters()])
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.05  # else the clip would not be at work
        new = [p.detach() - 0.005 / norm * g for p, g in zip(student.parameters(), gradients)]
        ema = [0.25 * s + 0.75 * t.detach() for s, t in zip(new, teacher.parameters())]
        got, info = train_step(*models, PROMPTS, TEACHER_PROMPTS, 6, EOS, **settings)
        assert [row[m].tolist() for row, m in zip(info["completions"], info["mask"])] == ys
        assert torch.equal(info["loss_mask"][:, 1:], info["mask"][:, 1:])
        assert not info["loss_mask"][:, 0].any() and got == pytest.approx(loss.item())
        assert_close([*student.parameters()], new, rtol=1e-5, atol=1e-7)
        assert_close([*teacher.parameters()], ema, rtol=1e-5, atol=1e-7)


def test_autocast_around_the_loop_changes_no_gradient():
    """Casts cached in the rollout have no graph, casts of the last step are of old weights."""
    losses, contexts = [], (PROMPTS, TEACHER_PROMPTS, 6, EOS)
    for around_loop in (True, False):
        student, teacher = tiny_gpt().float(), tiny_gpt().float()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        cast = dict(device_type="cpu", dtype=torch.bfloat16, cache_enabled=around_loop)
        clear = mock.patch("torch.clear_autocast_cache", wraps=torch.clear_autocast_cache)
        with torch.autocast(**cast, enabled=around_loop), clear as cleared:
            for i in range(5):
                with torch.autocast(**cast):
                    step = train_step(student, teacher, optimizer, *contexts, generator=seeded(i))
        losses.append(step[0])
    assert losses[0] == losses[1] and cleared.call_count == 10  # torch 2.4 needs both


def test_defaults_are_the_papers():
    """skip_tokens=0: the toy's answers are as short as what the released code leaves out."""
    paper = dict(divergence="reverse", alpha=0.02, temperature=1.0, grad_clip=1.0, skip_tokens=0)
    assert train_step.__kwdefaults__ == paper | {"generator": None}
    assert sdft_loss.__defaults__ == ("reverse",) and sdft.clip_and_step.__defaults__ == (1.0,)


# --- model.py ---


def test_model_is_gpt2_computed_by_hand():
    """Pre-norm, tanh GELU, causal attention head by head, tied output; all positions."""
    model, tokens, causal = tiny_gpt(), torch.arange(13) * 5 % 13, torch.ones(13, 13).tril() == 1
    w = model.state_dict()
    linear = lambda x, k: x @ w[k + ".weight"].T + w[k + ".bias"]
    gelu = lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def norm(x, k):
        z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return z * w[k + ".weight"] + w[k + ".bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"]
    for h in ("h.0.", "h.1."):
        heads, qkv = [], linear(norm(x, h + "ln_1"), h + "attn.c_attn")
        for head in (0, 8):
            q, k, v = (qkv[:, at + head : at + head + 8] for at in (0, 16, 32))
            heads.append((q @ k.T / 8**0.5).where(causal, -math.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), h + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    assert_close(model(tokens[None])[0], norm(x, "ln_f") @ w["wte.weight"].T)


def test_residual_projections_start_smaller_in_deeper_models():
    """At 0.02 / sqrt(2 n_layer), else the residual stream grows with the depth."""
    torch.manual_seed(0)
    h = GPT(GPTConfig(8, 8, n_layer=8, n_head=2, n_embd=64)).h[0]
    for layer, std in (h.attn.c_proj, 0.005), (h.mlp.c_proj, 0.005), (h.mlp.c_fc, 0.02):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05) and not layer.bias.any()


@pytest.mark.parametrize("n_pad", [torch.tensor([0, 4, 2]), None])
def test_chunks_with_a_cache_equal_one_pass(n_pad):
    """Prefill, one token, several tokens, the last; each row as if alone, without its padding."""
    model, tokens = tiny_gpt(), torch.arange(30).view(3, 10) % 13
    cache = model.kv_cache(3, 10)
    parts = [model(part, n_pad, cache) for part in tokens.split([5, 1, 3, 1], 1)]
    for i, n in enumerate([0, 0, 0] if n_pad is None else n_pad):
        assert_close(torch.cat(parts, 1)[i, n:], model(tokens[i : i + 1, n:])[0])


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_saved_model_is_read_back_the_same(prefix, tmp_path):
    """Also from shards, with and without a prefix. Any other order of the sizes would show."""
    model = tiny_gpt().float()
    model.save_pretrained(tmp_path)
    found = [GPT.from_pretrained(tmp_path)]
    (tmp_path / "pytorch_model.bin").unlink()
    weights = [(prefix + k.removeprefix("transformer."), w) for k, w in model.checkpoint().items()]
    torch.save(dict(weights[::2]), tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(weights[1::2]), tmp_path / "pytorch_model-00002-of-00002.bin")
    for same in [*found, GPT.from_pretrained(tmp_path)]:
        assert same.config == model.config
        assert_close(same.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_transformers_gpt2_computes_the_same_logits(tmp_path):
    """It reads our files and we its, in safetensors; of a stale file neither reads a weight."""
    transformers, tokens = pytest.importorskip("transformers"), torch.arange(13)[None]
    model, other = tiny_gpt().float(), tiny_gpt(1).float()
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert_close(theirs(tokens).logits, model(tokens))
    other.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    assert_close(GPT.from_pretrained(tmp_path)(tokens), model(tokens))
    other.save_pretrained(tmp_path)
    assert_close(GPT.from_pretrained(tmp_path)(tokens), other(tokens))


OTHER_WEIGHTS = {"lm_head.weight": 13, "wte.weight": None, "h.2.ln_1.bias": 13, "wpe.weight": 12}
OTHER_CONFIGS = {"activation_function": "relu", "layer_norm_epsilon": 1e-2, "n_inner": 7}
OTHER_CONFIGS |= {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
OTHER_CONFIGS |= {"model_type": "llama", "add_cross_attention": True}


def test_checkpoint_of_another_model_is_refused(tmp_path):
    """Weights untied, missing, superfluous, of another shape; code in a pickle; other settings."""
    for name, rows in OTHER_WEIGHTS.items():
        state = {k: w for k, w in tiny_gpt().checkpoint().items() if not k.endswith(name)}
        state |= {f"transformer.{name}": torch.zeros(rows, 16)} if rows else {}
        with pytest.raises((ValueError, RuntimeError), match=name):
            GPT.from_checkpoint(tiny_gpt().config, state)
    tiny_gpt().save_pretrained(tmp_path)
    torch.save(mock.Mock, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="unittest.mock"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor pytorch_model.bin"):
        GPT.from_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for field, value in OTHER_CONFIGS.items():
        (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
        with pytest.raises(ValueError, match=f"{field} is {value!r}"):
            GPT.from_pretrained(tmp_path)


def test_sizes_are_those_published_for_gpt2():
    """All heads are 64 wide, which no parameter count shows."""
    parameters = 124_439_808, 354_823_168, 774_030_080, 1_557_611_200
    for sizes, n in zip(GPT2_SIZES.values(), parameters, strict=True):
        with torch.device("meta"):
            model = GPT(GPTConfig(1024, 50257, *sizes))
        assert sum(p.numel() for p in model.parameters()) == n and sizes[2] == 64 * sizes[1]


def test_gpt2_by_name_is_downloaded_safely(monkeypatch):
    """From the name's own address, weights_only; with causal masks, no prefix, in any precision."""
    model, download = GPT(GPTConfig(1024, 50257, 1, 2, 4)), mock.Mock()
    state = {k.removeprefix("transformer."): w.double() for k, w in model.checkpoint().items()}
    download.return_value = state | {"h.0.attn.bias": torch.ones(1, 1, 1024, 1024)}
    monkeypatch.setitem(GPT2_SIZES, "tiny", (1, 2, 4))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert_close(GPT.from_pretrained("tiny").state_dict(), model.state_dict(), rtol=0, atol=0)
    asked = download.call_args[1]
    assert "/tiny/" in asked["url"] and asked["weights_only"] is True


# --- README.md ---


def test_readme_example_trains_a_hugging_face_model():
    """The loss can be copied as the front page says: the student moves, the teacher follows."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=256, eos_token_id=0, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    student = transformers.LlamaForCausalLM(config).eval()
    before = student.lm_head.weight.clone()
    ids = lambda text, return_tensors: mock.Mock(input_ids=torch.tensor([[*text.encode()]]))
    names = dict(student=student, tokenizer=ids, pairs=[("Who?", "Ann."), ("2 + 2?", "4")])
    exec(re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.S)[1], names)
    moved = lambda model: (model.lm_head.weight - before).norm()
    assert names["loss"] > 0 and 0 < moved(names["teacher"]) < 0.05 * moved(student)


def test_readme_map_names_functions_that_exist():
    """Such as `sdft.py:rollout`."""
    cells = re.findall(r"`([\w/]+\.py):(\w+)`", README)
    assert ("sdft.py", "rollout") in cells
    for file, name in cells:
        assert re.search(rf"^def {name}\b", (HERE / file).read_text("utf-8"), re.M), name
