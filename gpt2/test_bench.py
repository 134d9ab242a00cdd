"""python -m gpt2.bench in miniature: that it measures every phase, not what it measures."""

import importlib.util
import re

import pytest
import torch

from gpt2 import bench, checkpoint
from gpt2.conftest import small_gpt, write_rows
from sdft import distill_loss, teacher_context

needs_trl = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, bench.PACKAGES)), reason="transformers and trl"
)


def test_bench_prints_every_phase(tmp_path, capsys, monkeypatch):
    """Every phase runs once, and its time is not looked at."""
    checkpoint.save_model(small_gpt(), tmp_path)
    monkeypatch.setattr(bench, "median_seconds", lambda f, repeats=5: f() is None or 0.5)
    monkeypatch.setattr(bench, "limits", lambda device, dtype: (1e9, 1e9))
    flags = "--device cpu --batch_size 2 --max_new_tokens 8 --rollout_dtype bfloat16"
    bench.main(["--init_from", str(tmp_path), *flags.split()])
    printed = capsys.readouterr().out
    phases = "rollout", "scoring, loss, backward", "clipping, AdamW", "EMA", "the whole update"
    for part in ("rollout in bfloat16", "GB/s", "tokens/s", *(f"| {phase} |" for phase in phases)):
        assert part in printed, part


def test_bench_names_what_is_wrong(tmp_path, monkeypatch):
    """In one sentence, before anything is measured."""
    checkpoint.save_model(small_gpt(block_size=32), tmp_path)
    monkeypatch.setattr(bench, "in_a_process", None)
    wrong = {
        "do not fit block_size 32": ["--init_from", tmp_path, "--device", "cpu"],
        "nothing": ["--init_from", tmp_path / "nothing", "--device", "cpu"],
        "'8x64' is no shape": ["--peers", "--shapes", "8x64"],
        "'0x1\\+1' is no shape": ["--peers", "--update_shape", "0x1+1"],
        "needs 1064 tokens": ["--peers", "--shapes", "8x1000+64"],
        "needs 1090 tokens": ["--peers", "--update_shape", "1x500+90"],
    }
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda package: True)
    for sentence, flags in wrong.items():
        with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
            bench.main([str(word) for word in flags])
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(SystemExit, match="error: --peers needs transformers and trl: pip install"):
        bench.main(["--peers"])


@pytest.mark.skipif(not bench.memory("VmHWM"), reason="/proc is Linux's")
def test_a_peak_in_a_process_starts_afresh():
    """The parent's peak of more than 1 GiB must not count."""
    torch.zeros(2**28).fill_(1.0)
    assert bench.in_a_process("memory('VmHWM')") < 900 < 1024 < bench.memory("VmHWM")
    with pytest.raises(ValueError, match="memory\\(\\) ended with: TypeError"):
        bench.in_a_process("memory()")


def test_the_table_compares_what_belongs_together():
    """A rollout's ratio is how many times as fast ours is, an update's the share of their time."""
    rollouts = {("8x64+32", torch.float32): (2.0, 0.5)}
    updates = {ours: (1.0, 300.0) for ours in bench.OURS}
    updates |= {theirs: (2.0, None) for theirs, _ in bench.COMPARED}
    updates["TRL float32"] = 4.0, 400.0
    table = bench.table(rollouts, updates, "8x32+32").splitlines()
    assert "| rollout 8 × (64 + 32), float32, tokens/s | 128 | 512 | 4.00 |" in table
    start = "| update 8 × (32 + 32), s: TRL "
    assert start + "float32, ours float32 | 4.00 | 1.00 | 0.25 |" in table
    assert start + "as it comes, ours bfloat16 | 2.00 | 1.00 | 0.50 |" in table
    assert start + "float32, freed memory kept, ours float32 | 2.00 | 1.00 | 0.50 |" in table
    assert sum("MiB" in line for line in table) == 4 and "400 | 300 | 0.75 |" in table[-1]


@needs_trl
def test_peers_prints_the_table(capsys, monkeypatch):
    """In miniature, one update of each side: rows, ratios and versions."""
    monkeypatch.setattr(bench, "COMPARED", [("TRL as it comes", "ours bfloat16")])
    bench.main(["--peers", "--quick", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "trl 1." in printed and "threads" in printed
    rows = re.findall(r"^\| (.+?) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.]+) \|$", printed, re.M)
    labels = [f"rollout 2 × (4 + 4), {dtype}, tokens/s" for dtype in ("float32", "bfloat16")]
    labels.append("update 2 × (4 + 4), s: TRL as it comes, ours bfloat16")
    if bench.memory("VmHWM"):
        labels.append("peak memory of it, MiB: TRL as it comes, ours bfloat16")
        assert all(float(cell) > 50 for cell in rows[3][1:3])
    assert [row[0] for row in rows] == labels


@needs_trl
def test_trl_goes_on_from_our_folder(tmp_path, base, monkeypatch):
    """On our JSONL. The first step's loss is `sdft_loss`, as all prompts are as long."""
    for name, value in bench.QUIET.items():
        monkeypatch.setenv(name, value)
    from datasets import load_dataset
    from transformers import GPT2Tokenizer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    rows = [{"prompt": f"What is {i}?\n", "privileged_context": f"It is {i}"} for i in range(8)]
    file = write_rows(tmp_path / "data.jsonl", rows)
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "c"))
    tokenizer = GPT2Tokenizer.from_pretrained(base)
    options = {"output_dir": str(tmp_path / "trl"), "bf16": False, "learning_rate": 1e-3}
    options |= {"max_steps": 2, "per_device_train_batch_size": 4, "max_completion_length": 6}
    options["teacher_prompt_template"] = teacher_context("{prompt}", "{privileged_context}")
    args = SDFTConfig(**bench.TRL, **options)
    trainer = SDFTTrainer(
        model=str(base), args=args, train_dataset=data, processing_class=tokenizer
    )
    prepare, compute = trainer._prepare_training_batch, trainer._compute_self_distillation_loss
    batches, losses = [], []

    def prepared(inputs):
        batches.append((inputs, prepare(inputs)))
        return batches[-1][1]

    def computed(*arguments):
        losses.append(compute(*arguments))
        return losses[-1]

    trainer._prepare_training_batch, trainer._compute_self_distillation_loss = prepared, computed
    trainer.train()
    assert len(losses) == 2 and losses[0] > 0.01
    inputs, batch = batches[0]
    prompts = [tokenizer.encode(row["prompt"]) for row in inputs]
    contexts = [teacher_context(row["prompt"], row["privileged_context"]) for row in inputs]
    assert batch["prompt_ids"].tolist() == prompts
    model, completions = checkpoint.load_model(str(base)), batch["completion_ids"]
    roles = model, model, prompts, [tokenizer.encode(text) for text in contexts]
    loss, _ = distill_loss(*roles, completions, batch["completion_mask"].bool())
    assert losses[0].item() == pytest.approx(loss.item(), rel=1e-4)
