"""What gpt2/checkpoint.py guarantees about GPT-2's weights, logs and checkpoints of a run."""

import errno
import json
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch

import model as model_file
from gpt2 import checkpoint
from gpt2.checkpoint import load_model, save_model
from gpt2.conftest import small_gpt
from model import GPT, TRANSPOSED


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def form(request, monkeypatch):
    """The two weight files: with safetensors, and as if it were not installed."""
    if request.param == "pytorch_model.bin":
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    else:
        pytest.importorskip("safetensors", reason="safetensors is not installed; it is optional")
    return request.param


def same(a, b, **tolerance):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **dict(rtol=0, atol=0) | tolerance)


# --- Weights --------------------------------------------------------------------------------------


def test_sizes_have_the_published_parameter_counts():
    """V D + T D + L (12 D² + 13 D) + 2 D; gpt2-medium has 16 heads, which no count shows."""

    def count(V, T, L, D):
        return V * D + T * D + L * (12 * D**2 + 13 * D) + 2 * D

    published = [124439808, 354823168, 774030080, 1557611200]
    sizes = model_file.GPT2_SIZES.values()
    assert [count(50257, 1024, L, D) for L, _, D in sizes] == published
    assert [heads for _, heads, _ in sizes] == [12, 16, 20, 25]
    assert sum(p.numel() for p in small_gpt().parameters()) == count(263, 320, 2, 32)


def test_saved_weights_load_bit_for_bit(form, tmp_path):
    """From the folder and from the file; the stale file of an earlier save is gone."""
    model = small_gpt()
    (tmp_path / "pytorch_model.bin").write_bytes(b"stale")
    (tmp_path / "model.safetensors").write_bytes(b"stale")
    save_model(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {form, "config.json"}
    for path in (tmp_path, tmp_path / form):
        loaded = load_model(str(path))
        assert loaded.config == model.config and all(p.requires_grad for p in loaded.parameters())
        same(loaded, model)
    same(GPT.from_pretrained(tmp_path), model)  # the core reads the same files


def test_a_mapped_model_is_the_file_itself(form, tmp_path):
    """The same numbers, frozen; and a change of the file's bytes is seen, as nothing was copied."""
    model = small_gpt()
    save_model(model, tmp_path)
    mapped = checkpoint.map_model(str(tmp_path))
    same(mapped, model)
    assert not any(p.requires_grad for p in mapped.parameters())
    for name, w in mapped.state_dict().items():
        content, weight = (tmp_path / form).read_bytes(), model.state_dict()[name]
        at = content.find(weight.t().contiguous().numpy().tobytes()[:64])
        if name.endswith(TRANSPOSED):
            with open(tmp_path / form, "rb+") as f:
                f.seek(at)
                f.write(torch.tensor([7.0]).numpy().tobytes())
            assert at > 0 and w.flatten()[0] == 7.0, name


def test_a_saved_configuration_is_complete(tmp_path):
    """What transformers needs, without relying on its defaults."""
    save_model(small_gpt(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=320)
    expected |= dict(vocab_size=263, n_layer=2, n_head=2, n_embd=32, eos_token_id=262)
    assert config == config | expected | dict(activation_function="gelu_new")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_other_writers_checkpoints_are_read(prefix, tmp_path, monkeypatch):
    """Prefixes, causal masks, a tied output layer, half precision; n_inner said otherwise."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = small_gpt()
    save_model(model, tmp_path)
    file, config = tmp_path / "pytorch_model.bin", tmp_path / "config.json"
    fields = json.loads(config.read_text()) | {"n_inner": 4 * 32}
    config.write_text(json.dumps(fields))
    state = torch.load(file, weights_only=True)
    state = {name.replace("transformer.", prefix): w for name, w in state.items()}
    state[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
    state[f"{prefix}h.1.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state[f"{prefix}wte.weight"]
    torch.save(state, file)
    same(load_model(str(tmp_path)), model)
    torch.save({k: w.half() if w.is_floating_point() else w for k, w in state.items()}, file)
    loaded = load_model(str(tmp_path))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    same(loaded, model, rtol=1e-3, atol=1e-3)
    torch.save(state | {"lm_head.weight": state[f"{prefix}wte.weight"] + 1}, file)
    with pytest.raises(ValueError, match="output layer of its own"):
        load_model(str(tmp_path))


def test_logits_equal_transformers_both_ways(tmp_path):
    """The independent implementation, with every weight perturbed."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours, tokens = small_gpt(noise=0.2), torch.randint(263, (3, 40))
    save_model(ours, tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-4)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(str(tmp_path / "theirs"))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    """Neither as weights nor as a run's checkpoint, even with the right checksum."""

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    def plain_pickle(x, file):
        file.write_bytes(pickle.dumps(x, protocol=2))

    save_model(small_gpt(), tmp_path)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    torch.save("text", tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a plain checkpoint of tensors"):
        load_model(str(tmp_path))
    for save in (torch.save, plain_pickle):
        save({"wte.weight": Malicious()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="nothing in it was run"):
            load_model(str(tmp_path))
    torch.save({"step": Malicious()}, tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / f"00000001-{checkpoint.crc32(tmp_path / 'new')}.pt")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load_run(tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious()))  # the bait is real
    assert (tmp_path / "executed").exists()


def test_a_missing_safetensors_is_named(tmp_path, monkeypatch):
    """With the command that installs it."""
    pytest.importorskip("safetensors", reason="safetensors is not installed; it is optional")
    save_model(small_gpt(), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        load_model(str(tmp_path))


def test_a_download_is_guarded(monkeypatch):
    """No pickle may run; a missing network and a damaged file are told apart."""
    model = small_gpt(block_size=1024, vocab_size=50257)
    monkeypatch.setattr(model_file, "GPT2_SIZES", {"gpt2": (2, 2, 32)})
    seen = {}

    def fetch(url, weights_only=False, **_):
        seen.update(url=url, weights_only=weights_only)
        return model.checkpoint()

    def offline(*_, **__):
        raise OSError("Name or service not known")

    def damaged(*_, **__):
        raise RuntimeError("PytorchStreamReader failed")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    same(load_model("gpt2"), model)
    assert seen["weights_only"] is True and seen["url"].startswith("https://huggingface.co/")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="cannot download gpt2 .* connect to the network"):
        load_model("gpt2")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", damaged)
    with pytest.raises(ValueError, match="gpt2.bin is damaged .* delete it"):
        load_model("gpt2")


def test_damaged_weights_are_named(form, tmp_path):
    """Cut off anywhere, or with bytes of the header changed; the weights have no checksum."""
    save_model(small_gpt(), tmp_path)
    good, r = (tmp_path / form).read_bytes(), random.Random(1)
    at = [r.randint(0, 60) for _ in range(10)]
    broken = [good[: r.randint(0, len(good) - 1)] for _ in range(20)]
    broken += [good[:n] + r.randbytes(40) + good[n + 40 :] for n in at]
    for content in broken:
        (tmp_path / form).write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_model(str(tmp_path))
        assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_full_memory_is_not_called_damage(tmp_path, monkeypatch):
    """Fetching the file again would not help. PyTorch raises a RuntimeError on a CPU."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    save_model(small_gpt(), tmp_path)
    checkpoint.save_run(tmp_path, {"step": 1})
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(10**15))
    for load in (lambda: load_model(str(tmp_path)), lambda: checkpoint.load_run(tmp_path)):
        with pytest.raises(RuntimeError) as error:
            load()
        assert checkpoint.memory_is_full(error.value)


def test_a_flipped_bit_is_noticed(tmp_path, monkeypatch):
    """Anywhere in pytorch_model.bin; torch.load does not look at the file's checksums."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model, r = small_gpt(), random.Random(4)
    save_model(model, tmp_path)
    file, noticed = tmp_path / "pytorch_model.bin", 0
    good = file.read_bytes()
    for _ in range(60):
        bad = bytearray(good)
        bad[r.randrange(len(good))] ^= 1 << r.randrange(8)
        file.write_bytes(bad)
        try:
            same(load_model(str(tmp_path)), model)  # a bit of the padding between tensors
        except ValueError as e:
            noticed += "pytorch_model.bin is damaged" in str(e)
    assert noticed > 50


BIAS = "transformer.ln_f.bias"
ODD = [  # of tensors that a file may hold
    lambda w: w.to("meta"),
    lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    lambda w: torch.nested.nested_tensor([w]),
    lambda w: w.to_sparse(),
    lambda w: w.to(torch.complex64),
    lambda w: w.to(torch.int64),
    lambda w: w.bool(),
    lambda w: torch.zeros(1).expand(w.shape),  # a few bytes may stand for gigabytes
    lambda w: [*w],
    lambda w: None,
]


@pytest.mark.filterwarnings("ignore")  # PyTorch calls some of these experimental
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("transformer.h.1.ln_1.bias"), "lacks the weight h.1.ln_1.bias"),
        (lambda w: w.update(extra=w["transformer.ln_f.bias"]), "has an unknown weight extra"),
        (
            lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 32)}),
            r"h.0.mlp.c_fc.weight is \(128, 32\), but config.json means \(32, 128\)",
        ),
        (lambda w: w["transformer.ln_f.bias"].fill_(torch.nan), "ln_f.bias has values that are"),
        (lambda w: w.update({BIAS: w[BIAS].double() + 1e300}), "ln_f.bias has values that are"),
        (lambda w: w.pop("transformer.wte.weight"), "different sizes"),
        *(
            (lambda w, odd=odd: w.update({BIAS: odd(w[BIAS])}), "ln_f.bias is no plain")
            for odd in ODD
        ),
    ],
)
def test_wrong_weights_are_named(change, message, tmp_path, monkeypatch):
    """By name, instead of PyTorch's list of all that differs; a NaN would spoil the training."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    save_model(small_gpt(), tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


def test_a_wrong_configuration_is_named(tmp_path):
    """A size that is none or another, and whatever model.py does not compute."""
    save_model(small_gpt(), tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    sizes = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    changes = [{k: v} for k in sizes for v in (0, -1, "2", None, 3, 10**9, 1.5, True)]
    changes += [{"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 7}]
    changes += [{"layer_norm_epsilon": 1e-3}, {"scale_attn_by_inverse_layer_idx": True}]
    texts = [json.dumps(good | change).encode() for change in changes]
    texts += [b"", b"{", b"[]", b"7", b"\xff", json.dumps(good).encode()[:100]]
    texts += [json.dumps(good).encode()[:-1] + b', "n_layer": 2}']  # twice
    for text in texts:
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ValueError) as error:
            load_model(str(tmp_path))
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="no GPT-2 checkpoint.*check the path"):
        load_model(str(tmp_path / "nowhere"))


# --- Logs and checkpoints of a run ----------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """And nothing half-written beside it."""
    path = tmp_path / "file"
    checkpoint.write_atomically(path, lambda tmp: tmp.write_text("old"))

    def fails(tmp):
        tmp.write_text("ne")
        assert path.read_text() == "old"  # never written in place
        raise RuntimeError("No space\nleft on device")

    with pytest.raises(OSError, match=r"cannot write .*file \(No space left on device\); free"):
        checkpoint.write_atomically(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_log_forgets_what_comes_again(tmp_path):
    """Lines after the step, and one that a kill cut off; U+2028 in a string is no line break."""
    path = tmp_path / "log.jsonl"
    for step in range(4):
        checkpoint.append_line(path, {"step": step, "text": "a\u2028b"})
    odd = '5\n{}\n{"step": "1"}\n' + "[" * 10**5 + '\n{"step": 1, "te'
    path.write_text(path.read_text(encoding="utf-8") + odd, encoding="utf-8")
    checkpoint.forget_after(path, 2, last=9)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [0, 1, 2] and lines[-1] == ""


def test_a_full_disk_is_called_so():
    """torch.save's own message is "enforce fail ... unexpected pos". /dev/full is a full disk."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError) as error:
        checkpoint.save_tensors({"x": torch.ones(10**5)}, full)
    assert error.value.errno == errno.ENOSPC


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    """By step, each with its CRC in the name; leftovers of a kill are removed."""
    (tmp_path / ".new.tmp").write_text("half")
    for step in (0, 2, 10):
        checkpoint.save_run(tmp_path, {"step": step})
    assert [int(p.name[:8]) for p in sorted(tmp_path.iterdir())] == [2, 10]
    assert checkpoint.load_run(tmp_path) == {"step": 10}
    assert checkpoint.load_run(tmp_path / "empty") is None


def test_a_damaged_checkpoint_is_named_with_its_remedy(tmp_path):
    """Any byte changed or lost; the one before it is offered if there is one."""
    r = random.Random(2)
    for step in (1, 2):
        checkpoint.save_run(tmp_path, {"step": step, "x": torch.randn(99)})
    older, newest = checkpoint.run_checkpoints(tmp_path)
    good = newest.read_bytes()
    for i in range(40):
        at = r.randrange(len(good))
        changed = good[:at] + bytes([good[at] ^ r.randint(1, 255)]) + good[at + 1 :]
        newest.write_bytes(good[:at] if i % 2 else changed)
        with pytest.raises(ValueError, match=f"{newest.name} is damaged; .* {older.name}"):
            checkpoint.load_run(tmp_path)
    newest.unlink()
    assert checkpoint.load_run(tmp_path)["step"] == 1  # the remedy works
    older.write_bytes(b"")
    with pytest.raises(ValueError, match="start again in another --out_dir"):
        checkpoint.load_run(tmp_path)
