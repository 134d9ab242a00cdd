"""python -m gpt2.bench in miniature: that it measures what it names, not how long it takes."""

import re

import pytest
import torch

from gpt2 import bench, checkpoint, fast
from gpt2.conftest import small_gpt


def test_peers_prints_the_table(tmp_path, capsys, monkeypatch):
    """TRL's trainer really runs, with our settings; a ratio is of its own two cells."""
    sdft = pytest.importorskip("trl.experimental.sdft", reason="trl is not installed")
    checkpoint.save_model(small_gpt(), tmp_path)
    monkeypatch.setattr(bench, "UPDATE", (2, 4, 4))
    monkeypatch.setattr(bench, "COMPARED", [("TRL float32", [*bench.OURS][-1])])
    monkeypatch.setattr(bench, "in_a_process", lambda update, *arguments: update(*arguments))
    monkeypatch.setattr(bench, "rollout_seconds", lambda *_: [4.0, 0.5])
    configs, train = [], sdft.SDFTTrainer.train
    kept = lambda self: configs.append(self.args) or train(self)
    monkeypatch.setattr(sdft.SDFTTrainer, "train", kept)
    calls, step = [], fast.train_step

    def counted(*inputs, **options):
        calls.append(options | {"lengths": [*map(len, inputs[4])]})  # of the teacher's prompts
        return step(*inputs, **options)

    monkeypatch.setattr(fast, "train_step", counted)
    bench.main(["--peers", "--init_from", str(tmp_path)])
    (theirs,) = configs
    assert theirs.max_steps == 4 and theirs.per_device_train_batch_size == 2 and not theirs.bf16
    assert (theirs.distillation_mode, theirs.distillation_alpha) == ("full_logits", 1.0)
    assert (theirs.teacher_model_kind, theirs.teacher_update_rate) == ("ema", 0.02)
    assert theirs.num_generations == theirs.num_iterations == theirs.steps_per_generation == 1
    assert [options["micro_batch"] for options in calls] == [None] * 8 + [2] * 4
    dtypes = [options["rollout_dtype"] for options in calls[::4]]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32] and calls[0]["lengths"] == [
        8,
        8,
    ]
    printed, number = capsys.readouterr().out, r"([\d.,]+)"
    assert "| rollout 8 × (64 + 64), bfloat16, tokens/s | 128 | 1,024 | 8.00 |" in printed
    for what in ("update 2 × (4 + 4), s", "peak memory of it, MiB"):
        label = re.escape(f"{what}: {', '.join(bench.COMPARED[0])}")
        found = re.search(rf"\| {label} \| {number} \| {number} \| {number} \|", printed)
        a, b, ratio = (float(cell.replace(",", "")) for cell in found.groups())
        assert ratio == pytest.approx(b / a, rel=0.2) and b > 0
