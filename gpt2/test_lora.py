"""What gpt2/lora.py guarantees: adapters over one set of frozen weights. CPU only, offline."""

import json

import pytest
import torch

from gpt2 import checkpoint, fast, lora, settings, train
from gpt2.conftest import flags, last_checkpoint, lines, metrics, small_gpt, weights
from gpt2.run import prepare

TOKENS = torch.tensor([[3, 5, 7, 11, 13], [17, 19, 23, 29, 31]])
LORA = ["--lora_rank", 3, "--lora_alpha", 8.0, "--lr", 1e-2]


def adapted(base, rank=3, alpha=8.0, noise=0.0):
    """A student over the base's weights; with noise its adapters are as if trained."""
    model = lora.add_adapters(lora.share(base.requires_grad_(False)), rank, alpha)
    with torch.no_grad():
        for w in lora.trained(model).values():
            w.add_(noise * torch.randn_like(w))
    return model


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **dict(rtol=0, atol=0) | tolerance)


def begun(base, data, out, *more):
    """The run of these flags before its first step."""
    args, _ = settings.parse_args("", flags(base, data, out, *more))
    return prepare(args, None, torch.device("cpu"), 0, 1)


def trained_run(base, data, out, *more, steps=4):
    train.main(flags(base, data, out, *LORA, *more, steps=steps))
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, data):
    """An uninterrupted run of four steps with an EMA teacher."""
    return trained_run(base, data, tmp_path_factory.mktemp("whole") / "out")


# --- The model ------------------------------------------------------------------------------------


def test_untrained_adapters_change_nothing():
    """B = 0: the logits are the base's bit for bit, though A is not 0."""
    base = small_gpt()
    model = adapted(base)
    same(model(TOKENS), base(TOKENS))
    assert all(w.any() for name, w in lora.trained(model).items() if name.endswith("lora_A"))


def test_a_layer_is_low_rank_beside_the_base():
    """y = x Wᵀ + b + α/r x Aᵀ Bᵀ, written out, on all four linear layers of a block."""
    base = small_gpt()
    model = adapted(base, rank=2, alpha=6.0, noise=0.3)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        plain, layer = base.h[1].get_submodule(name), model.h[1].get_submodule(name)
        x = torch.randn(4, plain.weight.size(1))
        W = plain.weight + 6.0 / 2 * layer.lora_B @ layer.lora_A
        same(layer(x), x @ W.t() + plain.bias, rtol=1e-4, atol=1e-5)
    assert len(lora.trained(model)) == 2 * 4 * 2  # A and B of four layers in two blocks


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_equal_the_adapters(dtype):
    """As a plain GPT and as the model that samples, whose bfloat16 copy is merged."""
    base = small_gpt()
    model = adapted(base, noise=0.1)
    expected, close = model(TOKENS), dict(rtol=1e-4, atol=1e-4)
    assert (expected - base(TOKENS)).abs().max() > 0.1
    if dtype is None:
        plain = lora.merge(model)
        assert plain.state_dict().keys() == base.state_dict().keys()
    else:
        plain = fast.RolloutGPT.of(model, dtype)
        assert hasattr(plain, "lora") == (dtype == torch.float32)  # which shares the base's memory
    if dtype == torch.bfloat16:
        close = dict(rtol=0.05, atol=0.05 * expected.std().item())
    same(plain(TOKENS).float(), expected, **close)


def test_all_roles_share_the_frozen_weights(base, data, tmp_path):
    """The memory that adapters are there to save: one copy for start, student, EMA and, but for
    the blocks' packed matrices, rollout.
    """
    run = begun(base, data, tmp_path / "out", *LORA)
    models = run.start, run.student, run.teacher, fast.RolloutGPT.of(run.student)
    first = run.start.state_dict()
    for model in models:
        own = {k.replace(".linear.", "."): w for k, w in model.state_dict().items()}
        packed = (
            model is models[-1] and model.h[0].attn.c_attn.linear.__class__ is fast.PackedLinear
        )
        missing = {name for name in first if name not in own}
        assert missing == {k for k, w in first.items() if packed and w.dim() == 2 and k[:2] == "h."}
        assert all(own[k].data_ptr() == first[k].data_ptr() for k in first.keys() - missing)
    a, b = lora.trained(run.student), lora.trained(run.teacher)
    assert all(a[k].data_ptr() != b[k].data_ptr() and torch.equal(a[k], b[k]) for k in a)


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["--method", "sft"], ["--teacher", "frozen"], []], ids=str)
def test_only_adapters_are_trained_and_kept(more, base, data, tmp_path):
    """In gradients, the optimizer's and the checkpoint's state; a frozen teacher is not kept."""
    run = begun(base, data, tmp_path / "begun", *LORA, *more)
    before = {name: w.clone() for name, w in run.student.state_dict().items()}
    rows = run.sets["train"][:4]
    step = run.optimizer.step
    with_gradient = []

    def spy():
        named = run.student.named_parameters()
        with_gradient.extend(name for name, p in named if p.grad is not None)
        step()

    run.optimizer.step = spy
    for run.step in (0, 1):  # A's gradient is 0 as long as B is
        train.update(run, rows, fast.row_generators(0, run.step, range(4), run.device))
    changed = {name for name, w in run.student.state_dict().items() if not w.equal(before[name])}
    adapters = lora.trained(run.student).keys()
    assert changed == set(with_gradient) == set(adapters) and "lora_" in str(adapters)
    saved = last_checkpoint(trained_run(base, data, tmp_path / "out", *more, steps=2))
    assert saved["student"].keys() == adapters
    assert len(saved["optimizer"]["state"]) == len(adapters)
    assert saved["teacher"].keys() == (set() if more else set(adapters))


def test_a_frozen_teacher_is_the_base_bit_for_bit(base, data, tmp_path):
    """After training, whatever the student has become: nothing was merged into shared weights."""
    run = begun(base, data, tmp_path / "out", *LORA, "--teacher", "frozen")
    for run.step in range(2):
        generators = fast.row_generators(0, run.step, range(4), run.device)
        train.update(run, run.sets["train"][:4], generators)
        lora.merge(run.student)
    expected = checkpoint.load_model(str(base))(TOKENS)
    same(run.teacher(TOKENS), expected)
    assert not torch.equal(run.student(TOKENS), expected)


def test_an_ema_teacher_averages_the_adapters(base, data, tmp_path):
    """φ = α θ + (1 - α) φ of A and B after one step, and nothing else of it moves."""
    run = begun(base, data, tmp_path / "out", *LORA, "--ema_alpha", 0.25)
    first = {name: w.clone() for name, w in run.teacher.state_dict().items()}
    train.update(run, run.sets["train"][:4], fast.row_generators(0, 0, range(4), run.device))
    student = run.student.state_dict()
    expected = {k: 0.25 * student[k] + 0.75 * w for k, w in first.items()}
    same(run.teacher.state_dict(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(run.teacher(TOKENS), checkpoint.load_model(str(base))(TOKENS))


def test_a_resumed_run_equals_the_uninterrupted_one(base, data, tmp_path, whole, monkeypatch):
    """Weights, log and samples, bit for bit, after a kill in the middle of step 3."""

    class Killed(BaseException):
        pass

    def killed(run, rows, generators):
        if run.step == 2:
            raise Killed
        return update(run, rows, generators)

    update, out = train.update, tmp_path / "out"
    monkeypatch.setattr(train, "update", killed)
    with pytest.raises(Killed):
        trained_run(base, data, out)
    monkeypatch.undo()
    train.main(["--resume", "--out_dir", str(out), "--device", "cpu"])
    same(weights(out), weights(whole))
    for name in ("student", "teacher"):
        same(last_checkpoint(out)[name], last_checkpoint(whole)[name])
    assert metrics(out) == metrics(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_the_seed_decides_how_adapters_start(base, data, tmp_path):
    """And nothing else does, so that a run can be repeated."""
    states = []
    for seed in (1, 1, 2):
        torch.rand(1)
        run = begun(base, data, tmp_path / "out", *LORA, "--seed", seed)
        states.append(lora.state(run.student))
    same(states[0], states[1])
    assert not states[0]["h.0.attn.c_attn.lora_A"].equal(states[2]["h.0.attn.c_attn.lora_A"])


# --- What is saved --------------------------------------------------------------------------------


def test_the_saved_folder_is_the_merged_student(base, data, whole):
    """Base and the checkpoint's adapters give its logits; the KL to base is of the student too."""
    student = adapted(checkpoint.load_model(str(base)))
    saved = last_checkpoint(whole)["student"]
    student.load_state_dict(saved, strict=False)
    same(checkpoint.load_model(str(whole))(TOKENS), student(TOKENS), rtol=1e-4, atol=1e-4)
    assert lines(whole / "metrics.jsonl")[-1]["eval"]["kl_to_base"] > 0


def test_transformers_opens_the_merged_folder(whole):
    """The independent implementation computes the same logits."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(whole).eval()
    ours = checkpoint.load_model(str(whole))
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=0, atol=1e-4)


def test_the_adapter_folder_is_small_and_whole(base, whole):
    """Of the checkpoint's adapters alone; with the base they are all that the student is."""
    fields = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (
        3,
        8,
        str(base),
    )
    adapters = torch.load(whole / "adapter" / "adapter_model.bin", weights_only=True)
    prefix, saved = "base_model.model.transformer.", last_checkpoint(whole)["student"]
    same(adapters, {f"{prefix}{name}.weight": w for name, w in saved.items()})


def test_peft_opens_the_adapter_folder(base, whole):
    """The library whose format it is computes the merged student's logits."""
    pytest.importorskip("transformers", reason="transformers is not installed; it is optional")
    peft = pytest.importorskip("peft", reason="peft is not installed; it is optional")
    from transformers import GPT2LMHeadModel

    theirs = peft.PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(base), whole / "adapter"
    )
    ours = checkpoint.load_model(str(whole))
    torch.testing.assert_close(theirs.eval()(TOKENS).logits, ours(TOKENS), rtol=0, atol=1e-4)
