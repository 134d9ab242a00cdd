"""What gpt2/checkpoint.py guarantees about GPT-2's weights and a run's checkpoints."""

import json
import os
import sys
import types

import pytest
import torch

from gpt2 import checkpoint
from gpt2.checkpoint import load_model, load_run, run_checkpoints, save_model, save_run
from gpt2.conftest import same, small_gpt


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_saved_weights_load_bit_for_bit(form, tmp_path, monkeypatch):
    """The configuration is complete."""
    if form == "model.safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed; it is optional")
    else:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    model = small_gpt()
    save_model(model, tmp_path, types.SimpleNamespace(eos_id=7, folder=None))
    assert {p.name for p in tmp_path.iterdir()} == {form, "config.json", "generation_config.json"}
    config = json.loads((tmp_path / "config.json").read_text())
    expected = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=320)
    expected |= dict(vocab_size=263, n_layer=2, n_head=2, n_embd=32, activation_function="gelu_new")
    assert config == config | expected | dict(eos_token_id=7, bos_token_id=7)
    loaded = load_model(str(tmp_path))
    with open(tmp_path / form, "rb+") as f:  # A file in use may change: nothing is mapped.
        f.write(b"x" * (tmp_path / form).stat().st_size)
    assert loaded.config == model.config and all(p.requires_grad for p in loaded.parameters())
    same(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=f"cannot load {tmp_path} .*; .* fetch its files again"):
        load_model(str(tmp_path))


def test_a_damaged_checkpoint_is_named_with_its_remedy(tmp_path):
    """A bit changed, bytes lost, another version, a function: nothing in a pickle may be called."""
    state = dict.fromkeys(checkpoint.STATE) | {"student": torch.randn(9)}
    for step in (1, 2):
        save_run(tmp_path, state | {"step": step})
    older, newest = run_checkpoints(tmp_path)
    good = newest.read_bytes()
    at = good.index(torch.load(newest)["student"].numpy().tobytes()) + 5
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for bad in (flipped, good[:-9], {"step": 2}, state | {"student": os.system}):
        newest.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, newest)
        with pytest.raises(ValueError, match=f"cannot read .*{newest.name} .* {older.name}"):
            load_run(tmp_path)
    newest.unlink()
    assert load_run(tmp_path)["step"] == 1  # the remedy works
