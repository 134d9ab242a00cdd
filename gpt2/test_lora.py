"""What gpt2/lora.py guarantees: adapters over one set of frozen weights. Offline."""

import functools

import pytest
import torch

import sdft
from gpt2 import checkpoint, fast, lora, train
from gpt2.conftest import flags, same, small_gpt

TOKENS = torch.tensor([[3, 5, 7, 11, 13], [17, 19, 23, 29, 31]])
CONTEXTS = [[3, 5], [7]], [[2, 3, 5], [2, 7]], 6, 262  # of both roles, most tokens, end token


def adapted(base, rank=3, alpha=8.0, noise=0.0):
    """A student over the base's weights; with noise its adapters are as if trained."""
    model = lora.add_adapters(lora.share(base.requires_grad_(False)), rank, alpha)
    with torch.no_grad():
        for w in lora.trained(model).values():
            w.add_(noise * torch.randn_like(w))
    return model


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_equal_the_adapters(dtype, device):
    """As a plain GPT and as the model that samples, whose bfloat16 copy is merged.

    Untrained ones change nothing, bit for bit: B is 0, and A is not.
    """
    base, untrained = small_gpt().to(device), adapted(small_gpt()).to(device)
    tokens = TOKENS.to(device)
    same(untrained(tokens), base(tokens))
    assert all(w.any() for name, w in lora.trained(untrained).items() if name.endswith("lora_A"))
    model = adapted(base, noise=0.1)
    expected, close = model(tokens), dict(rtol=1e-4, atol=1e-4)
    assert (expected - base(tokens)).abs().max() > 0.1
    plain = lora.merge(model) if dtype is None else fast.RolloutGPT(model, dtype)
    if dtype == torch.bfloat16:
        close = dict(rtol=0.05, atol=0.05 * expected.std().item())
    same(plain(tokens).float(), expected, **close)
    same(base(tokens), small_gpt().to(device)(tokens))


def test_all_roles_share_the_frozen_weights():
    """The memory that adapters are there to save: base, student, EMA teacher and rollout."""
    base = small_gpt()
    student, first = adapted(base), base.state_dict()
    teacher = lora.share(student).requires_grad_(False)
    for model in (student, teacher, fast.RolloutGPT(student)):
        frozen = {k: w for k, w in model.named_parameters() if ".lora_" not in k}
        theirs = {k: first[k.replace(".linear.", ".")] for k in frozen}
        assert all(w.data_ptr() == theirs[k].data_ptr() for k, w in frozen.items())
    a, b = lora.trained(student), lora.trained(teacher)
    assert all(a[k].data_ptr() != b[k].data_ptr() and torch.equal(a[k], b[k]) for k in a)


def test_a_step_equals_the_textbook_step():
    """Greedily; only the adapters change, and the EMA teacher averages them."""
    found, start = [], adapted(small_gpt(), noise=0.1).state_dict()
    for step in (sdft.train_step, functools.partial(fast.train_step, generators=None)):
        student = adapted(fast.save_memory(small_gpt()), noise=0.1)
        teacher = lora.share(student).requires_grad_(False)
        optimizer = torch.optim.SGD(lora.trained(student).values(), lr=0.5)
        step(student, teacher, optimizer, *CONTEXTS, alpha=0.25, temperature=0)
        found.append((student.state_dict(), teacher.state_dict()))
    same(*found, rtol=1e-5, atol=1e-6)
    changed = {k for k, w in found[1][0].items() if not w.equal(start[k])}
    assert changed == {k for k in start if k.endswith(("lora_A", "lora_B"))}
    assert len(changed) == 2 * 4 * 2  # of four layers in two blocks


def test_transformers_and_peft_open_the_folders(base, data, tmp_path):
    """Independent implementations compute our logits, of the merged model and of the adapters."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    whole = tmp_path / "out"
    train.main(flags(base, data, whole, *"--lora_rank 3 --lora_alpha 8 --lr 1e-2".split()))
    ours = checkpoint.load_model(str(whole))(TOKENS)
    merged = transformers.GPT2LMHeadModel.from_pretrained(whole).eval()
    same(merged(TOKENS).logits, ours, atol=1e-4)
    peft = pytest.importorskip("peft", reason="peft is not installed; it is optional")
    plain = transformers.GPT2LMHeadModel.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(plain, whole / "adapter").eval()
    same(adapted(TOKENS).logits, ours, atol=1e-4)
