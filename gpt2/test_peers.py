"""Beside transformers and TRL: the bench in miniature, and a hand-over that is trained in TRL."""

import re

import pytest
import torch

from gpt2 import bench, checkpoint, peers, train
from gpt2.conftest import write_rows
from gpt2.data import RowReader, load_encoding
from sdft import distill_loss, teacher_context

needs_trl = pytest.mark.skipif(bool(peers.missing()), reason=f"optional: {peers.COMMAND}")


@needs_trl
def test_peers_prints_the_table_and_the_machine(capsys, monkeypatch):
    """In miniature, one update of each side: rows, ratios, processor and versions."""
    monkeypatch.setattr(peers, "COMPARED", [("as it comes", "bfloat16")])
    bench.main(["--peers", "--quick"])
    printed = capsys.readouterr().out
    assert peers.processor() in printed and "trl 1." in printed and "threads" in printed
    rows = re.findall(r"^\| (.+?) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.]+) \|$", printed, re.M)
    labels = [f"rollout 2 × (4 + 4), {dtype}, tokens/s" for dtype in ("float32", "bfloat16")]
    labels.append("update 2 × (4 + 4), s: TRL as it comes, ours bfloat16")
    if bench.memory("VmHWM"):
        labels.append("peak memory of it, MiB: TRL as it comes, ours bfloat16")
        assert all(float(cell.replace(",", "")) > 50 for cell in rows[3][1:3])
    assert [row[0] for row in rows] == labels


def test_the_table_compares_what_belongs_together():
    """A rollout's ratio is how many times as fast ours is, an update's the share of their time."""
    rolled = {("8x64+32", torch.float32): (2.0, 0.5)}
    updated = {(True, name): (1.0, 300.0) for name in peers.OURS}
    updated |= {(False, name): (2.0, None) for name, _ in peers.COMPARED}
    updated |= {(False, "float32"): (4.0, 400.0)}
    table = peers.table(rolled, updated, "8x32+32").splitlines()
    assert "| rollout 8 × (64 + 32), float32, tokens/s | 128 | 512 | 4.00 |" in table
    start = "| update 8 × (32 + 32), s: TRL "
    assert start + "float32, ours float32 | 4.00 | 1.00 | 0.25 |" in table
    assert start + "as it comes, ours bfloat16 | 2.00 | 1.00 | 0.50 |" in table
    assert sum("MiB" in line for line in table) == 4 and "400 | 300 | 0.75 |" in table[-1]


@pytest.mark.parametrize(
    "flag", [["--shapes", "8x64"], ["--shapes", "8x1000+64"], ["--update_shape", "0x1+1"]]
)
def test_a_wrong_shape_ends_in_one_sentence(flag, monkeypatch):
    """Before anything is measured."""
    monkeypatch.setattr(peers, "missing", list)
    monkeypatch.setattr(peers, "updates", None)
    with pytest.raises(SystemExit, match="error: ('.*' is no shape|a shape needs)"):
        bench.main(["--peers", *flag])


def test_without_the_packages_the_command_is_named(monkeypatch):
    """One sentence, with what to type."""
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "updates", None)
    with pytest.raises(SystemExit, match="error: --peers needs transformers and trl: pip install"):
        bench.main(["--peers"])


def settings_of_the_readme():
    """The fields of the table in gpt2/README.md that make TRL's trainer compute our defaults."""
    return {
        "distillation_alpha": 1.0,
        "distillation_mode": "full_logits",
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.02,
        "teacher_sync_steps": 1,
        "teacher_prompt_template": teacher_context("{prompt}", "{privileged_context}"),
        "num_generations": 1,
        "num_iterations": 1,
        "steps_per_generation": 1,
        "max_completion_length": 6,
        "max_prompt_length": None,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_steps": 2,
    }


@needs_trl
def test_trl_goes_on_from_our_folder(tmp_path, base, monkeypatch):
    """Two steps on our JSONL. The first one's loss is `sdft_loss`, as all prompts are as long."""
    for name, value in peers.QUIET.items():
        monkeypatch.setenv(name, value)
    from datasets import load_dataset
    from transformers import GPT2Tokenizer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    rows = [{"prompt": f"What is {i}?\n", "privileged_context": f"It is {i}"} for i in range(8)]
    file = write_rows(tmp_path / "data.jsonl", rows)
    folder = tmp_path / "out"

    train.main(
        ["--init_from", str(base), "--data", str(file), "--out_dir", str(folder), "--steps", "1"]
        + ["--batch_size", "4", "--max_new_tokens", "6", "--device", "cpu"]
    )
    how = {"output_dir": str(tmp_path / "trl"), "use_cpu": True, "report_to": "none"}
    how |= {"save_strategy": "no", "bf16": False, "disable_tqdm": True}
    args = SDFTConfig(**settings_of_the_readme(), **how)
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "c"))
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    trainer = SDFTTrainer(
        model=str(folder), args=args, train_dataset=data, processing_class=tokenizer
    )
    prepare, compute = trainer._prepare_training_batch, trainer._compute_self_distillation_loss
    batches, losses = [], []

    def prepared(inputs):
        batches.append((inputs, prepare(inputs)))
        return batches[-1][1]

    def computed(*arguments):
        loss = compute(*arguments)
        losses.append(loss.item())
        return loss

    trainer._prepare_training_batch, trainer._compute_self_distillation_loss = prepared, computed
    trainer.train()
    assert len(losses) == 2 and losses[0] > 0.01

    reader = RowReader(load_encoding(folder), 320, 6)
    ours = {row["prompt"]: row for row in reader.read(file, reader.training)}
    inputs, batch = batches[0]
    chosen = [ours[row["prompt"]] for row in inputs]
    prompts, teacher_prompts = ([r[k] for r in chosen] for k in ("prompt_ids", "teacher_ids"))
    assert batch["prompt_ids"].tolist() == prompts
    completions, mask = batch["completion_ids"], batch["completion_mask"].bool()
    model = checkpoint.load_model(str(folder))
    loss, _ = distill_loss(model, model, prompts, teacher_prompts, completions, mask)
    assert losses[0] == pytest.approx(loss.item(), rel=1e-4)
