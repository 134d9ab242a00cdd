"""python -m gpt2.bench in miniature: that it measures every phase, not what it measures."""

import re

from gpt2 import bench, checkpoint
from gpt2.conftest import small_gpt


def test_bench_prints_every_phase(tmp_path, capsys, monkeypatch):
    """Every phase runs once, and its time is not looked at."""
    checkpoint.save_model(small_gpt(), tmp_path)
    monkeypatch.setattr(bench, "median_seconds", lambda f: f() is None or 0.5)
    flags = "--device cpu --batch_size 2 --max_new_tokens 8 --rollout_dtype bfloat16"
    bench.main(["--init_from", str(tmp_path), *flags.split()])
    printed = capsys.readouterr().out
    phases = "rollout", "scoring, loss, backward", "packing, clipping, AdamW, EMA", "the update"
    for part in ("rollout in torch.bfloat16", "tokens/s", *(f"| {phase} |" for phase in phases)):
        assert part in printed, part


def test_peers_prints_the_table(tmp_path, capsys, monkeypatch):
    """Of our updates beside each other, as theirs take long; a ratio is of its own two cells."""
    checkpoint.save_model(small_gpt(), tmp_path)
    monkeypatch.setattr(bench, "PACKAGES", {})
    monkeypatch.setattr(bench, "UPDATE", (2, 4, 4))
    monkeypatch.setattr(bench, "COMPARED", [[*bench.OURS][1:]])
    monkeypatch.setattr(bench, "in_a_process", lambda update, *arguments: update(*arguments))
    monkeypatch.setattr(bench, "rollout_seconds", lambda *_: [4.0, 0.5])
    bench.main(["--peers", "--init_from", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| rollout 8 × (64 + 64), bfloat16, tokens/s | 128 | 1,024 | 8.00 |" in printed
    label = ", ".join(bench.COMPARED[0])
    for row in (f"update 2 × (4 + 4), s: {label}", f"peak memory of it, MiB: {label}"):
        assert re.search(rf"{re.escape(row)} \| [\d.,]+ \| [\d.,]+ \| [\d.]+ \|", printed)
