"""Every flag of python -m gpt2.train reaches what it names. CPU only, offline.

Two runs with every number changed, one per method, against direct calls of the functions.
"""

import argparse
import copy
import json

import pytest
import torch

from gpt2 import checkpoint, evaluate, fast, look, settings, train
from gpt2.conftest import (
    EOS,
    error_of,
    flags,
    last_checkpoint,
    lines,
    metrics,
    small_gpt,
    weights,
    write_rows,
)
from gpt2.data import RowReader, load_encoding, minibatch, pad_right
from gpt2.run import read_data
from model import GPT
from sdft import clip_and_step, completion_logits, sft_loss, teacher_context

CPU = torch.device("cpu")

# Every number of settings.NUMBERS, none at its default.
CHANGED = dict(ema_alpha=0.3, skip_tokens=1, temperature=0.8, max_new_tokens=7, steps=5)
CHANGED |= dict(batch_size=3, micro_batch=2, lr=2e-3, warmup=3, weight_decay=0.5, grad_clip=0.05)
CHANGED |= dict(seed=7, log_every=2, eval_every=3, save_every=1)


def schedule(step):
    """CHANGED's learning rate at a step: warm-up times cosine, written out."""
    warm_up = [1 / 3, 2 / 3, 1, 1, 1][step]
    cosine = [1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915][step]
    return 2e-3 * warm_up * cosine


@pytest.fixture(scope="module")
def changed_runs(tmp_path_factory, base, data):
    """An SDFT and an SFT run with every number changed."""
    template = tmp_path_factory.mktemp("template") / "t.txt"
    template.write_text("{article} or {demonstration}? {prompt}")
    test = write_rows(template.parent / "test.jsonl", [{"prompt": "Of 5?\n", "answer": "5"}])
    outs = {}
    for method in ("sdft", "sft"):
        outs[method] = tmp_path_factory.mktemp(method) / "out"
        numbers = [word for name, value in CHANGED.items() for word in (f"--{name}", value)]
        more = ["--divergence", "jsd", "--teacher_template", template, "--test", test]
        train.main(flags(base, data, outs[method], *numbers, *more, "--method", method))
    return outs, template, test


@pytest.fixture(scope="module")
def direct(changed_runs, base, data):
    """The same training by direct calls: student, teacher and info of every step, by method."""
    assert set(CHANGED) | {"lora_rank", "lora_alpha"} == set(settings.NUMBERS)  # see test_lora.py
    out = {}
    for method in ("sdft", "sft"):
        student = fast.lean(checkpoint.load_model(str(base)))
        teacher = copy.deepcopy(student).requires_grad_(False)
        reader = RowReader(load_encoding(base), 320, 7, "{article} or {demonstration}? {prompt}")
        rows = reader.read(data / "train.jsonl", reader.training)
        optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.5, fused=True)
        steps = []
        for step in range(5):
            optimizer.param_groups[0]["lr"] = schedule(step)
            batch = [rows[i] for i in minibatch(len(rows), 3, step, 7)]
            prompts = [row["prompt_ids"] for row in batch]
            if method == "sft":
                demonstrations = [row["demonstration_ids"] for row in batch]
                tokens, mask = pad_right(demonstrations, EOS, CPU)
                loss = sft_loss(completion_logits(student, prompts, tokens), tokens, mask)
                loss.backward()
                clip_and_step(student, optimizer, loss.item(), 0.05)
                steps.append((loss.item(), {"mask": mask}))
                continue
            inputs = prompts, [row["teacher_ids"] for row in batch], 7, EOS
            how = dict(divergence="jsd", alpha=0.3, temperature=0.8, grad_clip=0.05, skip_tokens=1)
            how["micro_batch"] = 2
            how["generators"] = fast.row_generators(7, step, range(3), CPU)
            steps.append(fast.train_step(student, teacher, optimizer, *inputs, **how))
        out[method] = student, teacher, steps
    return out


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_every_flag_reaches_the_update(method, changed_runs, direct):
    """Weights of student and teacher after five steps, against direct calls of the steps."""
    saved, (student, teacher, _) = last_checkpoint(changed_runs[0][method]), direct[method]
    # SFT micro-batches are summed here at once, so that Adam sees other roundings.
    close = dict(rtol=1e-4, atol=1e-6) if method == "sdft" else dict(rtol=0, atol=2e-4)
    torch.testing.assert_close(saved["student"], student.state_dict(), **close)
    if method == "sdft":
        torch.testing.assert_close(saved["teacher"], teacher.state_dict(), **close)


def test_logged_metrics_are_the_steps_own(changed_runs, direct):
    """The divergence is a mean over the tokens that carry loss: one per row is skipped."""
    rows = [row for row in metrics(changed_runs[0]["sdft"]) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]  # --log_every 2, and the last
    for row in rows:
        loss, info = direct["sdft"][2][row["step"] - 1]
        tokens = info["loss_mask"].sum().item()
        endless = [7 == n and c[6] != EOS for n, c in zip(info["mask"].sum(1), info["completions"])]
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["divergence"] == pytest.approx(
            info["divergence"].sum().item() / tokens, rel=1e-4
        )
        assert row["length"] == pytest.approx(info["mask"].sum().item() / 3)
        assert row["truncated"] == pytest.approx(sum(map(bool, endless)) / 3)
        assert row["lr"] == pytest.approx(schedule(row["step"] - 1), rel=1e-5)
    for row in [row for row in metrics(changed_runs[0]["sft"]) if "loss" in row]:
        loss, info = direct["sft"][2][row["step"] - 1]
        assert row["loss"] == pytest.approx(loss, rel=1e-3) and row["divergence"] is None
        assert row["length"] == pytest.approx(info["mask"].sum().item() / 3)


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_scores_are_of_the_sets_named(method, changed_runs, direct, base, data):
    """--test, --ood, --eval and --max_new_tokens, before and after; --eval_every 3."""
    outs, template, test = changed_runs
    rows = [row for row in metrics(outs[method]) if "eval" in row]
    assert [row["step"] for row in rows] == [0, 3, 5]
    reader = RowReader(load_encoding(base), 320, 7, template.read_text())
    sets = {"train": reader.read(data / "train.jsonl", reader.training)}
    sets["test"] = reader.read(test, reader.task)
    sets["ood"] = reader.read(data / "ood.jsonl", reader.task)
    sets["prior"] = reader.read(data / "prior.jsonl", reader.prior)
    start_model, (student, *_) = checkpoint.load_model(str(base)), direct[method]
    for scores, model, kl_base in ((rows[0], start_model, None), (rows[2], student, start_model)):
        expected = evaluate.evaluate(model, sets, reader.enc, 7, 2, kl_base)
        assert scores["eval"] == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert rows[0]["eval"]["kl_to_base"] == 0 < rows[2]["eval"]["kl_to_base"]


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_looks_are_at_the_models_of_the_step(method, changed_runs, direct, base, data):
    """Metrics and samples at the end, by --seed, --temperature, --divergence and the template."""
    out, template = changed_runs[0][method], changed_runs[1]
    reader, start = RowReader(load_encoding(base), 320, 7, template.read_text()), None
    sets = {"train": reader.read(data / "train.jsonl", reader.training)}
    sets["prior"] = reader.read(data / "prior.jsonl", reader.prior)
    (student, teacher, _), start = direct[method], checkpoint.load_model(str(base))
    models = student, teacher if method == "sdft" else None, start
    settings_of_run = argparse.Namespace(**CHANGED, method=method, divergence="jsd")
    expected, said = look.look(models, sets, reader.enc, settings_of_run, 5)
    row = [row for row in metrics(out) if "eval" in row][-1]
    assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert (row["new"], row["prior"]) == (row["eval"]["lenient"], row["eval"]["prior_acc"])
    written = [sample for sample in lines(out / "samples.jsonl") if sample["step"] == 5]
    close = ("divergence", "student", "teacher", "reward")
    for a, b in zip(written, said, strict=True):
        assert a["response"] == b["response"] and a["teacher_prompt"] == b["teacher_prompt"]
        for x, y in zip(a["tokens"], b["tokens"], strict=True):
            found, wanted = ([token[k] for k in close] for token in (x, y))
            assert found == pytest.approx(wanted, rel=0.05, abs=1e-3)


def test_checkpoints_come_as_often_as_asked(changed_runs):
    """--save_every 1: the newest two are of steps 4 and 5."""
    for out in changed_runs[0].values():
        names = [int(p.name[:8]) for p in checkpoint.run_checkpoints(out / "checkpoints")]
        assert names == [4, 5] and not list(out.rglob("*tmp*"))


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_micro_batch_limits_the_rows_of_a_pass(method, tmp_path, base, data, monkeypatch):
    """No result shows it, as only memory changes: rows of the passes that keep activations."""
    hidden, rows = GPT.hidden, set()

    def counted(model, tokens, *more):
        if torch.is_grad_enabled():
            rows.add(len(tokens))
        return hidden(model, tokens, *more)

    monkeypatch.setattr(GPT, "hidden", counted)
    more = ["--method", method, "--micro_batch", 3]  # of four rows
    train.main(flags(base, data, tmp_path / "out", *more, steps=1))
    assert rows == {1, 3}


def test_data_flags_reach_the_reader(tmp_path, base, data):
    """--teacher_reads, --skip_long and --method, in the rows that training gets."""
    enc, more = load_encoding(base), ["--out_dir", "unused", "--data", str(data / "train.jsonl")]

    def first(block_size, *argv):
        args, _ = settings.parse_args("", [*more, *argv])
        return read_data(args, enc, block_size)[0]["train"][0]

    template = teacher_context("What is 0?\n", "It is 0 ")
    texts = {"article": "Article 0.\n\nWhat is 0?\n", "demonstration": template}
    texts["both"] = "Article 0.\n\n" + template
    for reads, text in texts.items():
        assert enc.decode(first(320, "--teacher_reads", reads)["teacher_ids"]) == text
    longest = max(len(enc.encode_ordinary(text)) for text in texts.values()) + 64
    with pytest.raises(ValueError, match="--skip_long"):
        first(longest)  # other demonstrations are longer by three letters
    assert first(longest, "--skip_long")["prompt"] == "What is 0?\n"
    row = {"prompt": "Q\n", "article": "A"}
    more[-1] = str(write_rows(tmp_path / "d.jsonl", [row]))
    assert first(320, "--teacher_reads", "article")["prompt"] == "Q\n"
    with pytest.raises(ValueError, match="demonstration is missing"):
        first(320, "--teacher_reads", "article", "--method", "sft")


def test_every_set_is_read_from_its_flag(tmp_path, base):
    """OOD measured on the test set would look like any other score. --test defaults to --data."""
    enc, argv = load_encoding(base), ["--out_dir", "unused"]
    for name in ("data", "test", "ood", "eval"):
        row = {"prompt": f"Of {name}?\n", "demonstration": "D", "answer": "A"}
        argv += [f"--{name}", str(write_rows(tmp_path / name, [row]))]
    names = {"train": "data", "test": "test", "ood": "ood", "prior": "eval"}
    for names, argv in ((names, argv), (names | {"test": "data"}, argv[:4] + argv[6:])):
        sets = read_data(settings.parse_args("", argv)[0], enc, 320)[0]
        read = {
            name: [enc.decode(row["prompt_ids"]) for row in rows] for name, rows in sets.items()
        }
        assert read == {name: [f"Of {flag}?\n"] for name, flag in names.items()}


def test_the_base_is_what_the_kl_is_measured_to(tmp_path, base, data):
    """--base, in a second stage; before its first step the KL is what the first stage left."""
    first, second = tmp_path / "first", tmp_path / "second"
    train.main(flags(base, data, first, steps=2))
    old = ["--old", data / "ood.jsonl", "--test", data / "ood.jsonl"]
    train.main(flags(first, data, second, "--base", base, "--lr", 0, *old, steps=1))
    results = json.loads((second / "results.json").read_text())
    sets, enc = {"train": [], "ood": [], "prior": []}, load_encoding(base)
    reader = RowReader(enc, 320, 6)
    sets["test"] = reader.read(data / "ood.jsonl", reader.task)
    models = checkpoint.load_model(str(first)), checkpoint.load_model(str(base))
    kl = evaluate.evaluate(models[0], sets, enc, 6, 4, models[1])["kl_to_base"]
    for when in ("base", "final"):
        assert results[when]["kl_to_base"] == pytest.approx(kl, rel=1e-3) and kl > 0.001
        assert results[when][f"old {data / 'ood.jsonl'}"] == results[when]["lenient"]
    assert "as_teacher" in results["base"]


def test_a_base_of_another_shape_is_named(tmp_path, base, data):
    """Before anything is written, as is one that is not there."""
    checkpoint.save_model(small_gpt(vocab_size=300), tmp_path / "odd")
    argv = flags(base, data, tmp_path / "out")
    assert "--base" in error_of(*argv, "--base", tmp_path / "odd")
    assert "--base nowhere" in error_of(*argv, "--base", "nowhere")
    assert "cannot read nowhere.jsonl" in error_of(*argv, "--old", "nowhere.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, alpha", [("ema", 0.25), ("frozen", 0.0), ("live", 1.0)])
def test_the_teacher_follows_its_flag(name, alpha, tmp_path, base, data):
    """φ = α θ + (1 - α) φ after one step; a frozen teacher is --init_from, not saved again."""
    more = ["--teacher", name, "--ema_alpha", 0.25, "--eval_every", 9]
    train.main(flags(base, data, tmp_path / "out", *more, steps=1))
    before, saved = weights(base), last_checkpoint(tmp_path / "out")
    student, teacher = saved["student"], saved["teacher"]
    assert not torch.equal(student["wte.weight"], before["wte.weight"])
    moves = before if alpha else {}
    expected = {k: alpha * student[k] + (1 - alpha) * before[k] for k in moves}
    torch.testing.assert_close(teacher, expected, rtol=0, atol=1e-6)
    assert lines(tmp_path / "out" / "metrics.jsonl")[-1]["eval"]["kl_to_base"] > 0
