"""python -m gpt2.bench in miniature: that it measures every phase, not what it measures."""

import importlib.util
import re

import pytest
import torch

from gpt2 import bench, checkpoint
from gpt2.conftest import small_gpt

needs_trl = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, bench.PACKAGES)), reason="transformers and trl"
)


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


def test_bench_names_what_is_wrong(tmp_path, monkeypatch):
    """In one sentence, before anything is measured."""
    with pytest.raises(SystemExit, match="error: cannot load .*nothing"):
        bench.main(["--init_from", str(tmp_path / "nothing")])
    checkpoint.save_model(small_gpt(block_size=32), tmp_path)
    with pytest.raises(SystemExit, match="error: .*block_size"):
        bench.main(["--init_from", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(SystemExit, match="error: --peers needs transformers and trl: pip install"):
        bench.main(["--peers", "--init_from", str(tmp_path)])


@needs_trl
def test_peers_prints_the_table(tmp_path, capsys, monkeypatch):
    """In miniature, a process for each update, whose peak does not count this one's of 1 GiB."""
    torch.zeros(2**28).fill_(1.0)
    checkpoint.save_model(small_gpt(), tmp_path)
    monkeypatch.setattr(bench, "COMPARED", [("TRL as it comes", "ours bfloat16")])
    monkeypatch.setattr(bench, "ROLLOUT", (2, 4, 4))
    monkeypatch.setattr(bench, "UPDATE", (2, 4, 4))
    bench.main(["--peers", "--init_from", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "trl 1." in printed and "threads" in printed
    rows = re.findall(r"^\| (.+?) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.]+) \|$", printed, re.M)
    labels = [f"rollout 2 × (4 + 4), {dtype}, tokens/s" for dtype in ("float32", "bfloat16")]
    labels.append("update 2 × (4 + 4), s: TRL as it comes, ours bfloat16")
    labels.append("peak memory of it, MiB: TRL as it comes, ours bfloat16")
    assert [row[0] for row in rows] == labels
    numbers = [[float(cell.replace(",", "")) for cell in row[1:]] for row in rows]
    for theirs, ours, ratio in numbers[:2]:  # of rates; a rounded cell is off by less than 5%
        assert ratio == pytest.approx(ours / theirs, rel=0.05, abs=0.02)
    for theirs, ours, ratio in numbers[2:]:
        assert ratio == pytest.approx(ours / theirs, rel=0.2, abs=0.02)
    assert 50 < numbers[3][1] < 1024
