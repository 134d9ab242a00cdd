"""python -m gpt2.bench in miniature: that it measures every phase, not what it measures."""

import pytest
import torch

from gpt2 import bench, checkpoint
from gpt2.conftest import small_gpt


@pytest.mark.parametrize("block_size", [160, 1024])
def test_bench_prints_every_phase_and_limit(block_size, tmp_path, capsys, monkeypatch):
    """In miniature: every phase runs once, and its time is not looked at."""
    checkpoint.save_model(small_gpt(block_size=block_size), tmp_path)
    monkeypatch.setattr(bench, "median_seconds", lambda f, device, repeats=5: f() is None or 0.5)
    monkeypatch.setattr(bench, "limits", lambda device, dtype: (1e9, 1e9))
    flags = "--device cpu --batch_size 2 --max_new_tokens 32 --rollout_dtype bfloat16"
    bench.main(["--init_from", str(tmp_path), *flags.split()])
    printed = capsys.readouterr().out
    phases = "rollout", "teacher's scoring", "clipping, AdamW", "EMA", "the whole update"
    for part in ("rollout in bfloat16", "GB/s", "tokens/s", *(f"| {phase} |" for phase in phases)):
        assert part in printed, part
    assert f"a token of {min(512, block_size - 64)} costs" in printed


def test_bench_names_what_does_not_fit(tmp_path):
    """In one sentence, before anything is measured."""
    checkpoint.save_model(small_gpt(block_size=32), tmp_path)
    with pytest.raises(SystemExit, match="error: .* do not fit block_size 32"):
        bench.main(["--init_from", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit, match="error: .*nothing"):
        bench.main(["--init_from", str(tmp_path / "nothing"), "--device", "cpu"])


@pytest.mark.skipif(not bench.memory("VmHWM"), reason="/proc is Linux's")
def test_a_peak_in_a_process_starts_afresh():
    """The parent's peak of more than 1 GiB must not count."""
    torch.zeros(2**28).fill_(1.0)
    assert bench.in_a_process("memory('VmHWM')") < 0.9 * 2**30 < bench.memory("VmHWM")
