"""What gpt2/checkpoint.py guarantees about GPT-2's weights, logs and checkpoints of a run."""

import json
import os
import pickle
import random
import sys

import pytest
import torch

import model as model_file
from gpt2 import checkpoint
from gpt2.checkpoint import load_model, load_run, run_checkpoints, save_model, save_run
from gpt2.conftest import small_gpt
from model import GPT


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


def state(step, **more):
    """Of a checkpoint of a run."""
    return dict.fromkeys(checkpoint.STATE) | {"step": step} | more


# --- Weights --------------------------------------------------------------------------------------


def test_saved_weights_load_bit_for_bit(form, tmp_path):
    """The stale file of an earlier save is gone, and the core reads the same folder."""
    model = small_gpt()
    (tmp_path / "pytorch_model.bin").write_bytes(b"stale")
    (tmp_path / "model.safetensors").write_bytes(b"stale")
    save_model(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {form, "config.json"}
    loaded = load_model(str(tmp_path))
    assert loaded.config == model.config and all(p.requires_grad for p in loaded.parameters())
    same(loaded, model)
    same(GPT.from_pretrained(tmp_path), model)
    with open(tmp_path / form, "rb+") as f:  # A file in use may change: nothing is mapped.
        f.write(b"x" * (tmp_path / form).stat().st_size)
    same(loaded, model)
    assert (tmp_path / form).stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_a_saved_configuration_is_complete(tmp_path):
    """What transformers needs, without relying on its defaults; the end token is the caller's."""
    save_model(small_gpt(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=320)
    expected |= dict(vocab_size=263, n_layer=2, n_head=2, n_embd=32, eos_token_id=262)
    assert config == config | expected | dict(activation_function="gelu_new")
    save_model(small_gpt(), tmp_path, eos_id=7)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == 7


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
    """Neither as weights nor as a run's checkpoint."""

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    save_model(small_gpt(), tmp_path)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    torch.save({"wte.weight": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load"):
        load_model(str(tmp_path))
    save_run(tmp_path, state(1))
    torch.save(state(1, student=Malicious()), run_checkpoints(tmp_path)[0])
    with pytest.raises(ValueError, match="damaged"):
        load_run(tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious()))  # the bait is real
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "change", ["lost", "renamed", "shape", "nan", "cut off", "no config", "llama"]
)
def test_unusable_weights_are_named(change, form, tmp_path):
    """In one sentence: the folder, what is wrong with it, what to do."""
    model = small_gpt()
    if change == "nan":
        model.ln_f.bias.data[0] = torch.nan
    if change in ("lost", "renamed", "shape"):
        weights = GPT.checkpoint(model)
        w = weights.pop("transformer.ln_f.bias")
        weights |= {"renamed": {"x": w}, "shape": {"transformer.ln_f.bias": w[:-1]}}.get(change, {})
        model.checkpoint = lambda: weights
    save_model(model, tmp_path)
    if change == "cut off":
        (tmp_path / form).write_bytes((tmp_path / form).read_bytes()[:-9])
    if change == "no config":
        (tmp_path / "config.json").unlink()
    if change == "llama":
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    word = {"lost": "ln_f.bias", "renamed": "", "shape": "ln_f.bias", "nan": "not finite"}
    with pytest.raises(ValueError, match=f"cannot load {tmp_path} .*{word.get(change, '')}") as e:
        load_model(str(tmp_path))
    assert len(str(e.value).splitlines()) == 1 and "fetch its files again" in str(e.value)


def test_a_missing_safetensors_is_named(tmp_path, monkeypatch):
    """With the command that installs it."""
    pytest.importorskip("safetensors", reason="safetensors is not installed; it is optional")
    save_model(small_gpt(), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        load_model(str(tmp_path))


def test_a_download_is_read_with_care(monkeypatch):
    """A missing network, or a damaged file, is told with its remedy."""
    model, fetch = small_gpt(block_size=1024, vocab_size=50257), "load_state_dict_from_url"
    monkeypatch.setattr(model_file, "GPT2_SIZES", {"gpt2": (2, 2, 32)})
    monkeypatch.setattr(torch.hub, fetch, lambda *_, weights_only, **__: model.checkpoint())
    same(load_model("gpt2"), model)

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, fetch, offline)
    with pytest.raises(ValueError, match="Name or service .*connect to the network.*gpt2.bin"):
        load_model("gpt2")


def test_full_memory_is_not_called_damage(tmp_path, monkeypatch):
    """Fetching the file again would not help. PyTorch raises a RuntimeError on a CPU."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    save_model(small_gpt(), tmp_path)
    save_run(tmp_path, state(1))
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(10**15))
    for load in (lambda: load_model(str(tmp_path)), lambda: load_run(tmp_path)):
        with pytest.raises(RuntimeError) as error:
            load()
        assert checkpoint.memory_is_full(error.value)


# --- Logs and checkpoints of a run ----------------------------------------------------------------


def test_a_log_goes_back_to_a_step(tmp_path):
    """Later lines go, the final look's, and one that a kill cut off; U+2028 is no line break."""
    path, text = tmp_path / "log.jsonl", "a\u2028b"
    rows = [{"step": step, "text": text} for step in (0, 1, 2, 3)]
    looks = [{"step": 2, "eval": {}}, {"step": 2, "tokens": []}, {"step": 1, "eval": {}}]
    lines = [json.dumps(row, ensure_ascii=False) for row in [*rows, *looks]]
    odd = ["5", "{}", '{"step": "1"}', "[" * 10**5, '{"step": 1, "te']
    path.write_text("\n".join([*lines, *odd]), encoding="utf-8")
    expected = [*rows[:3], looks[2]]
    (tmp_path / ".log.jsonl.tmp").write_text("left by a kill")
    assert checkpoint.rewind(path, 2, last=2) == expected
    kept = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in kept[:-1]] == expected and kept[-1] == ""
    assert checkpoint.rewind(tmp_path / "none", 2, last=2) == []


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    """By step; leftovers of a kill are removed."""
    save_run(tmp_path, state(0))
    (tmp_path / "checkpoints" / ".00000001.pt.tmp").write_text("half")
    for step in (2, 10):
        save_run(tmp_path, state(step))
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"00000002.pt", "00000010.pt"}
    assert load_run(tmp_path) == state(10)
    assert load_run(tmp_path / "empty") is None


def test_a_damaged_checkpoint_is_named_with_its_remedy(tmp_path):
    """Bytes changed or lost; the one before it is offered if there is one."""
    r = random.Random(2)
    for step in (1, 2):
        save_run(tmp_path, state(step, student=torch.randn(9)))
    older, newest = run_checkpoints(tmp_path)
    good = newest.read_bytes()
    at = good.index(torch.load(newest)["student"].numpy().tobytes()) + 5
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for bad in (flipped, b"", *(good[: r.randrange(len(good))] for _ in range(20))):
        newest.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{newest.name} is damaged, .* {older.name}"):
            load_run(tmp_path)
    torch.save({"step": 2}, newest)
    with pytest.raises(ValueError, match="of another version of the program"):
        load_run(tmp_path)
    newest.unlink()
    assert load_run(tmp_path)["step"] == 1  # the remedy works
    older.write_bytes(b"")
    with pytest.raises(ValueError, match="start again in another --out_dir"):
        load_run(tmp_path)
