"""What python -m gpt2.train guarantees, in runs of miniature size. CPU only, offline."""

import os
import shlex
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch

from data import files, watch
from data.scoring import contains
from gpt2 import checkpoint, evaluate, fast, lora, train
from gpt2.checkpoint import load_model, load_run, run_checkpoints
from gpt2.conftest import EOS, ROOT, error_of, flags, same, small_gpt, write_rows
from gpt2.data import TEMPLATES, RowReader, minibatch
from gpt2.tokenizer import load_tokenizer, read_json


def weights(out):
    return load_model(str(out)).state_dict()


def metrics(out):
    """The updates and the evaluations of metrics.jsonl, without what the clock wrote."""
    rows = files.read(out / "metrics.jsonl")[0]
    of_clock = ("tokens_per_s", "seconds")
    rows = [{k: v for k, v in row.items() if k not in of_clock} for row in rows]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval" in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, data):
    """An uninterrupted run of six steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train.main(flags(base, data, out, steps=6))
    return out


def assert_same_run(out, whole):
    same(weights(out), weights(whole))
    assert metrics(out) == metrics(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    for name in ("base", "final"):
        assert read_json(out / "results.json")[name] == read_json(whole / "results.json")[name]


# None at its default.
CHANGED = dict(ema_alpha=0.3, skip_tokens=1, temperature=0.8, max_new_tokens=7, steps=5)
CHANGED |= dict(batch_size=3, micro_batch=2, lr=2e-3, warmup=3, weight_decay=0.5, grad_clip=0.05)
CHANGED |= dict(seed=7, log_every=2, eval_every=3, save_every=1, divergence="jsd", eval_rows=3)
WARM_UP = [1 / 3, 2 / 3, 1, 1, 1]
COSINE = [1, 0.9045084972, 0.6545084972, 0.3454915028, 0.0954915028]
ALPHA = {"ema": 0.3, "frozen": 0.0, "live": 1.0}


@pytest.mark.parametrize("kind", [*ALPHA, "sft"])
def test_a_run_is_a_plain_loop_with_its_flags(kind, tmp_path, base, data, whole, capsys):
    """And their values, bit for bit: weights, teacher, log, scores, samples, steps written."""
    out, template, old = tmp_path / "out", tmp_path / "t.txt", data / "ood.jsonl"
    template.write_text("{article} or {demonstration}? {prompt}")
    argv = [word for name, value in CHANGED.items() for word in (f"--{name}", value)]
    argv += ["--method", "sft"] if kind == "sft" else ["--teacher", kind]
    if kind == "ema":
        argv += ["--test", old, "--teacher_template", template, "--base", whole]
    else:
        argv += ["--teacher_reads", "article"]
    if kind == "live":
        argv += ["--lora_rank", 3, "--lora_alpha", 8]
    train.main(flags(base, data, out, *argv, "--old", old))
    cut = "note: the first 3 of 5 rows of test are evaluated (--eval_rows)"
    assert (cut in capsys.readouterr().out.splitlines()) == (kind != "ema")

    tokenizer = load_tokenizer(base, 263)
    text = template.read_text() if kind == "ema" else TEMPLATES["article"]
    reader = RowReader(tokenizer, 320, 7, text, skip_long=True)
    texts, questions = ([row] for row in reader.read(data / "prior.jsonl", reader.prior))
    sets = {"train": reader.read(data / "train.jsonl", reader.training), "texts": texts}
    ood = reader.read(old, reader.task)
    answered = [sets["train"][i] for i in (0, 2, 3)]  # as many as --eval_rows
    sets |= {"test": ood if kind == "ema" else answered, "questions": questions}
    sets |= {"ood": ood, f"old {old}": ood}
    student = fast.save_memory(load_model(base))
    if kind == "live":
        torch.manual_seed(7)
        lora.add_adapters(student, 3, 8.0)
    teacher = None if kind == "sft" else lora.share(student).requires_grad_(False)
    start = load_model(whole if kind == "ema" else base)  # that the KL is measured to
    optimizer = torch.optim.AdamW(lora.trained(student).values(), weight_decay=0.5, fused=True)
    looks, logged, samples, phase = [], [], [], "sft" if kind == "sft" else "sdft"
    streams = lambda step, n: fast.row_generators(7, step, range(n), "cpu")
    rollout = lambda *inputs: fast.rollout(*inputs[:5], streams(0, len(inputs[1])))

    def look(step):
        models = [model and fast.RolloutGPT(model) for model in (student, teacher, start)]
        origin = start if step or kind == "ema" else None  # None is the student itself
        scores = evaluate.evaluate(models[0], sets, tokenizer, 7, 2, origin)
        row = {"phase": phase, "step": step}
        inputs = evaluate.rows_to_watch(sets, 313), tokenizer.decode, contains, 7, EOS, "jsd", 0.8
        seen, new = watch.look(*models, *inputs, 8, rollout, skill=None, **row)
        named = {"eval": scores, "new": scores["lenient"], "prior": scores["prior_acc"]}
        looks.append(row | seen | named)
        looks[-1]["warnings"] = watch.warnings(looks)
        samples.extend(new)

    look(0)
    for step in range(5):
        batch = [sets["train"][i] for i in minibatch(6, 3, step, 7)]
        prompts, contexts, demonstrations = (
            [row[f"{name}_ids"] for row in batch] for name in ("prompt", "teacher", "demonstration")
        )
        rate = optimizer.param_groups[0]["lr"] = 2e-3 * WARM_UP[step] * COSINE[step]
        if kind == "sft":
            loss, info = fast.sft_step(student, optimizer, prompts, demonstrations, EOS, 0.05, 2)
            mean = None
        else:
            options = dict(divergence="jsd", temperature=0.8, skip_tokens=1, grad_clip=0.05)
            options |= dict(alpha=ALPHA[kind], micro_batch=2, generators=streams(step, 3))
            models = student, teacher, optimizer
            loss, info = fast.train_step(*models, prompts, contexts, 7, EOS, **options)
            mean = (info["divergence"].sum() / info["loss_mask"].sum()).item()
        endless = 1 - (info["completions"] == EOS).any(1).float().mean().item()
        row = {"phase": phase, "step": step + 1, "loss": loss, "divergence": mean}
        row |= {"lr": rate, "length": info["mask"].sum().item() / 3, "truncated": endless}
        logged += [pytest.approx(row)] if step + 1 in (2, 4, 5) else []
        look(step + 1) if step + 1 in (3, 5) else None

    same(weights(out), lora.merge(student).state_dict())
    moves = kind in ("ema", "live")
    same(load_run(out)["teacher"], lora.state(teacher) if moves else {})
    assert [int(file.stem) for file in run_checkpoints(out)] == [4, 5]
    looks = [{name: pytest.approx(value) for name, value in row.items()} for row in looks]
    assert metrics(out) == (logged, looks)
    assert files.read(out / "samples.jsonl")[0] == samples and samples[-1]["tokens"]
    results = read_json(out / "results.json")
    assert [results["base"], results["final"]] == [looks[0]["eval"], looks[-1]["eval"]]
    words = shlex.split(results["command"])
    assert words[:3] == ["python", "-m", "gpt2.train"]
    assert vars(train.parse_args(words[3:])) == results["config"]


def test_keep_best_keeps_the_best_evaluation(base, data, tmp_path, monkeypatch):
    """Not the base's, not a later one that is only as good, and not the last; also if resumed.

    The base's tokenizer and settings go with the weights.
    """
    out, scores = tmp_path / "out", [0.9, 0.5, 0.7]
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"lenient": scores.pop(0)})
    with pytest.raises(IndexError):  # in the evaluation at step 6
        train.main(flags(base, data, out, "--keep", "best", steps=8))
    best, scores[:] = load_run(out), [0.7, 0.6]
    train.main(["--resume", "--out_dir", str(out)])
    assert best["step"] == 4
    for folder, student in ((out / "best", best["student"]), (out, load_run(out)["student"])):
        same(weights(folder), student)
        for name in ("vocab.json", "merges.txt", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (base / name).read_bytes()
        settings = {"bos_token_id": EOS, "eos_token_id": EOS, "repetition_penalty": 1.5}
        assert read_json(folder / "generation_config.json") == settings


@pytest.mark.parametrize("step, more", [(0, ""), (4, ""), (6, ""), (4, "--lora_rank 3 --lr 1e-2")])
def test_a_killed_run_resumes_bit_for_bit(step, more, tmp_path, base, data, whole, monkeypatch):
    """In the base's evaluation, after a checkpoint, at the end; a log is ahead, a line cut off."""
    out, append = tmp_path / "out", files.append
    if more:
        whole = tmp_path / "whole"
        train.main(flags(base, data, whole, *more.split(), steps=6))

    def killed(path, rows):
        append(path, rows)
        if (path.name, rows[0]["step"]) == ("samples.jsonl", step):
            with open(path, "a") as f:
                f.write('{"step": 4, "pro')
            (out / ".samples.jsonl.tmp").write_text("cut off too")
            raise SystemExit  # as kill -9 leaves the files

    monkeypatch.setattr(files, "append", killed)
    with pytest.raises(SystemExit):  # without a checkpoint, --resume starts
        train.main(flags(base, data, out, "--resume", *more.split(), steps=6))
    monkeypatch.undo()
    for rate in (0.5, 1e-05):  # The settings come from the checkpoint. 1e-05 is the default.
        assert f"--lr {rate} differs" in error_of("--resume", "--out_dir", out, "--lr", rate)
    for _ in range(2):  # A finished run repeats no line.
        train.main(["--resume", "--out_dir", str(out)])
        assert_same_run(out, whole)


def test_a_signal_finishes_the_step(tmp_path, base, data, whole, monkeypatch, capsys):
    """And saves it; the command that is printed repeats the run. A second Ctrl-C does not wait."""
    out, update, signals = tmp_path / "an out", train.update, [signal.SIGTERM]

    def interrupted(run, rows, generators):
        for name in signals if run.step == 2 else ():
            signal.raise_signal(name)
        return update(run, rows, generators)

    monkeypatch.setattr(train, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(base, data, out, steps=6))
    assert stopped.value.code == 130 and load_run(out)["step"] == 3
    again = capsys.readouterr().out.splitlines()[-1].split("go on with: python -m gpt2.train ")[1]
    train.main(shlex.split(again))
    assert_same_run(out, whole)
    signals += [signal.SIGINT]
    with pytest.raises(SystemExit, match="--resume goes on"):
        train.main(flags(base, data, tmp_path / "twice", "--lr", 0))


def test_two_processes_make_the_update_of_one(tmp_path, base, data, monkeypatch):
    """Ragged responses, all flags that weight rows; one process prints and writes."""
    more = ["--skip_tokens", 1, "--micro_batch", 1, "--lr", 1e-4, "--eval_every", 9]
    more += ["--grad_clip", 1e6]  # Clipping would hide a gradient of the wrong scale.
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -m gpt2.train".split()
    words = [sys.executable, *torchrun, *flags(base, data, two, *more, steps=3)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, cwd=ROOT, **pipes)
    train.main(flags(base, data, one, *more, steps=3))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    # Adam divides by the gradient's size, so that where it is only rounding noise, as for the
    # keys' biases, full steps of 1e-4 in any direction remain. The moments have no such trouble.
    moments = (load_run(out)["optimizer"]["state"].values() for out in (one, two))
    for a, b in zip(*moments, strict=True):
        same(a["exp_avg"], b["exp_avg"], atol=0.01 * a["exp_avg"].abs().max().item() + 1e-7)
    same(weights(two), weights(one), atol=3e-4)
    for a, b in zip(metrics(two)[0], metrics(one)[0], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert printed.count("| base |") == 1 == printed.count("rows, 4 a step")


def test_a_run_keeps_its_folder_to_itself(tmp_path, base, data, whole, monkeypatch, capsys):
    """From a new run, also of train_toy, from --resume without a checkpoint, from another."""
    out = tmp_path / "out"
    for folder, argv in ((out, flags(base, data, out)), (whole, ["--resume", "--out_dir", whole])):
        with checkpoint.locked(folder):  # Two would mix their logs.
            assert f"another run is writing to {folder}" in error_of(*argv)
    assert not out.exists()  # it was empty
    assert "already holds a run" in error_of(*flags(base, data, whole))
    with pytest.raises(ValueError, match="a folder of its own"):
        files.begin_anew(whole, [])
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows, which has no such locks
    written = {path.name for path in whole.iterdir()} - {"checkpoints"}
    for name in [*written, "best", "adapter", "pytorch_model.bin"]:
        (tmp_path / name).write_text("precious")
        for more in ([], ["--resume"]):
            assert f"already holds {name}" in error_of(*flags(base, data, tmp_path, *more))
        assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
        (tmp_path / name).unlink()
    assert "cannot be locked here; do not start a second run in it" in capsys.readouterr().out


def test_what_cannot_be_used_ends_in_one_sentence(tmp_path, base, data, monkeypatch):
    """And nothing is written: flags, files, models, data, processes. Of full memory, the remedy."""
    argv, row = flags(base, data, tmp_path / "out"), {"prompt": "Q\n", "demonstration": "D"}
    checkpoint.save_model(small_gpt(vocab_size=300), tmp_path / "odd")
    unscored = write_rows(tmp_path / "d", [row])
    values = [(f"--{name}", -1) for name in CHANGED] + [("--lr", "nan"), ("--out_dir", "")]
    values += [("--step", 1), ("--temperature", 0.009), ("--skip_tokens", 6)]
    wrong = [(flag, value, flag) for flag, value in values]  # by argparse, which names the flag
    wrong += [("--test", "nope", "nope"), ("--data", os.devnull, "no rows")]
    wrong += [("--init_from", "nowhere", "cannot load nowhere"), ("--data", "", "--data is")]
    wrong += [("--base", tmp_path / "odd", "--base must"), ("--device", "abacus", "abacus")]
    for flag, value, word in wrong:
        assert word in error_of(*argv, flag, value), (flag, value)
    assert "needs a score" in error_of(*argv, "--data", unscored, "--keep", "best")
    full = mock.Mock(side_effect=RuntimeError("not enough memory: you tried to allocate memory"))
    monkeypatch.setattr(train, "update", full)
    assert "memory is full; lower --micro_batch" in error_of(*argv, "--out_dir", tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "multiple of the 3" in error_of(*argv)
    monkeypatch.setenv("RANK", "3")
    assert "RANK=3 is not below WORLD_SIZE=3" in error_of(*argv)
    assert not (tmp_path / "out").exists()
