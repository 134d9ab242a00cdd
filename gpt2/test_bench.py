"""python -m gpt2.bench in miniature: that it measures what it names, not how long it takes."""

from unittest import mock

import pytest
import torch

from gpt2 import bench, checkpoint, fast
from gpt2.conftest import small_gpt


def test_peers_prints_the_table(tmp_path, capsys, monkeypatch):
    """TRL's trainer really runs; ours has the settings of its label; a ratio is of its cells."""
    pytest.importorskip("trl.experimental.sdft", reason="trl is not installed")
    checkpoint.save_model(small_gpt(), tmp_path)
    monkeypatch.setattr(bench, "UPDATE", (2, 4, 4))
    monkeypatch.setattr(bench, "COMPARED", [("TRL float32", [*bench.OURS][-1])])
    monkeypatch.setattr(bench, "in_a_process", lambda update, *arguments: update(*arguments))
    monkeypatch.setattr(bench, "rollout_seconds", lambda *_: [4.0, 0.5])
    step = mock.Mock(wraps=fast.train_step)
    monkeypatch.setattr(fast, "train_step", step)
    bench.main(["--peers", "--init_from", str(tmp_path)])
    ours = [(None, torch.float32), (None, torch.bfloat16), (2, torch.float32)]
    calls = [(c.kwargs["micro_batch"], c.kwargs["rollout_dtype"]) for c in step.call_args_list]
    assert calls == [settings for settings in ours for _ in range(4)]
    printed = capsys.readouterr().out.splitlines()
    assert "| rollout 8 × (64 + 64), bfloat16, tokens/s | 128 | 1,024 | 8.00 |" in printed
    for what in ("update 2 × (4 + 4), s", "peak memory of it, MiB"):
        cells = next(line.split(" | ") for line in printed if line.startswith(f"| {what}: "))
        a, b, ratio = (float(cell.strip(" |").replace(",", "")) for cell in cells[1:])
        assert ratio == pytest.approx(b / a, rel=0.2) and b > 0
