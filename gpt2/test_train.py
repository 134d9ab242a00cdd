"""What python -m gpt2.train guarantees, in runs of miniature size. CPU only, offline."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2 import checkpoint, settings, train
from gpt2.conftest import ROOT, error_of, flags, last_checkpoint, lines, metrics, weights


def start(*argv):
    """The command in a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, argv)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)


# --- What a run leaves behind ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, data):
    """An uninterrupted run of eight steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train.main(flags(base, data, out, steps=8))
    return out


def test_a_finished_run_is_a_starting_point(tmp_path, whole, base, data, capsys):
    """Weights and vocabulary travel; SFT saves no teacher; --report shows both."""
    out = tmp_path / "next"
    capsys.readouterr()
    train.main(flags(whole, data, out, "--method", "sft", steps=1))
    printed = capsys.readouterr().out
    assert "| base |" in printed and "| sft, 1 steps |" in printed and "s left" in printed
    assert {p.name for p in out.iterdir()} >= {"vocab.json", "merges.txt", "config.json"}
    saved = last_checkpoint(out)
    assert saved["teacher"] == {} and saved["optimizer"]["state"][0]["step"] == 1
    train.main(["--report", str(whole), str(out)])
    table = capsys.readouterr().out
    assert "sdft, 8 steps" in table and "sft, 1 steps" in table and table.count("base of") == 2


@pytest.mark.parametrize("teacher", ["ema", "frozen", "live"])
def test_a_second_runs_teacher_starts_as_its_student(
    teacher, tmp_path, whole, base, data, monkeypatch
):
    """As the weights that --init_from ends with, and not as the first run's teacher or base."""
    seen, update = [], train.update

    def spy(run, rows, generators):
        seen.append(
            [{k: w.clone() for k, w in m.state_dict().items()} for m in (run.student, run.teacher)]
        )
        return update(run, rows, generators)

    monkeypatch.setattr(train, "update", spy)
    train.main(flags(whole, data, tmp_path / "out", "--teacher", teacher, "--base", base, steps=1))
    first = last_checkpoint(whole)
    for role in seen[0]:
        torch.testing.assert_close(role, weights(whole), rtol=0, atol=0)
    assert not torch.equal(first["teacher"]["wte.weight"], first["student"]["wte.weight"])


def assert_same_run(out, whole):
    torch.testing.assert_close(weights(out), weights(whole), rtol=0, atol=0)
    assert metrics(out) == metrics(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def resume(out):
    train.main(["--resume", "--out_dir", str(out), "--device", "cpu"])


class Killed(BaseException):
    """Nothing catches it: the files are left as kill -9 leaves them."""


@pytest.mark.parametrize("save_every", [2, 3], ids=["at a checkpoint", "after one"])
def test_a_killed_run_resumes_bit_for_bit(save_every, tmp_path, base, data, whole, monkeypatch):
    """Killed while step 4 writes its samples; the log has a line cut off, and is ahead."""
    out, append = tmp_path / "out", checkpoint.append_line

    def killed(path, row):
        if row["step"] == 4 and path.name == "samples.jsonl":
            with open(path, "a") as f:
                f.write('{"step": 4, "pro')
            raise Killed
        append(path, row)

    monkeypatch.setattr(checkpoint, "append_line", killed)
    argv = flags(base, data, out, "--save_every", save_every, steps=8)
    with pytest.raises(Killed):
        train.main([*argv, "--resume"])  # without a checkpoint, --resume starts
    assert lines(out / "metrics.jsonl")[-1]["step"] == 4
    monkeypatch.undo()
    resume(out)  # the settings come from the checkpoint
    assert_same_run(out, whole)


def test_a_second_ctrl_c_does_not_wait(tmp_path, base, data, monkeypatch):
    """Both in step 3, which is lost; --resume goes on from the checkpoint of step 2."""

    def interrupted(run, rows, generators):
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return update(run, rows, generators)

    update = train.update
    monkeypatch.setattr(train, "update", interrupted)
    with pytest.raises(SystemExit, match="interrupted; .* --resume goes on"):
        train.main(flags(base, data, tmp_path / "out"))
    assert last_checkpoint(tmp_path / "out")["step"] == 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_and_saves(name, tmp_path, base, data, whole, monkeypatch):
    """It comes in the middle of step 3; --resume then repeats the uninterrupted run."""
    out, update = tmp_path / "out", train.update

    def interrupted(run, rows, generators):
        if run.step == 2:
            signal.raise_signal(getattr(signal, name))
        return update(run, rows, generators)

    monkeypatch.setattr(train, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(base, data, out, "--save_every", 100, steps=8))
    assert stopped.value.code == 130 and last_checkpoint(out)["step"] == 3
    monkeypatch.undo()
    resume(out)
    assert_same_run(out, whole)


def test_ctrl_c_in_the_terminal(tmp_path, base, data, monkeypatch):
    """A real process and signal: it says how to go on and leaves no traceback.

    The terminal cannot print the folder's é, which must not matter either.
    """
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out, quiet = tmp_path / "é", ["--eval_every", 10**6]
    argv = flags(base, data, out, *quiet, "--save_every", 10**6, steps=10**6)
    process = start("-m", "gpt2.train", *argv)
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    step = int(re.search(r"stopped after step (\d+), saved; go on with: ", printed)[1])
    assert process.returncode == 130 and "--resume --out_dir" in printed and errors == ""
    assert r"\xe9" in printed and last_checkpoint(out)["step"] == step


def test_ctrl_c_during_the_imports_is_quiet(tmp_path, monkeypatch):
    """PyTorch takes seconds to import; here a file that sleeps has its name."""
    (tmp_path / "torch.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start("-m", "gpt2.train", "--help")
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == -signal.SIGINT


def test_two_processes_make_the_update_of_one(tmp_path, base, data):
    """Ragged responses, all flags that weight rows; one process prints and writes."""
    # Clipping would hide a gradient of the wrong scale.
    more = ["--skip_tokens", 1, "--micro_batch", 1, "--lr", 1e-4, "--grad_clip", 1e6]
    more += ["--eval_every", 9]
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -m gpt2.train".split()
    process = start(*torchrun, *flags(base, data, two, *more, steps=3))
    train.main(flags(base, data, one, *more, steps=3))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    # Adam divides by the gradient's size, so that where it is only rounding noise, as for the
    # keys' biases, full steps of 1e-4 in any direction remain. The moments have no such trouble.
    moments = (last_checkpoint(out)["optimizer"]["state"].values() for out in (one, two))
    for a, b in zip(*moments, strict=True):
        atol = 0.01 * a["exp_avg"].abs().max().item() + 1e-7
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=0, atol=atol)
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=3e-4)
    for a, b in zip(*(metrics(out, "eval", "warnings") for out in (two, one)), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert printed.count("| base |") == 1


# --- Mistakes -------------------------------------------------------------------------------------


def test_resume_keeps_the_settings_and_the_data(tmp_path, base, data, whole):
    """Another setting, the default included, or changed data would not resume anything."""
    assert "--lr 0.5 differs" in error_of("--resume", "--out_dir", whole, "--lr", "0.5")
    assert "--lr 1e-05 differs" in error_of("--resume", "--out_dir", whole, "--lr", "1e-5")
    assert "already holds a run" in error_of(
        *flags(base, data, whole)
    )  # a finished run is not overwritten
    changed = tmp_path / "train.jsonl"
    changed.write_bytes((data / "train.jsonl").read_bytes())
    train.main(flags(base, data, tmp_path / "out", "--data", changed, steps=1))
    changed.write_text(changed.read_text() + "\n")
    assert "has changed" in error_of("--resume", "--out_dir", tmp_path / "out")
    nothing = error_of("--resume", "--out_dir", tmp_path / "empty")
    assert "no checkpoint in" in nothing and "--data is missing" in nothing


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, base, data, whole, monkeypatch):
    """The third checkpoint cannot be written; --resume goes on from the second."""
    out, save, calls = tmp_path / "out", torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) < 3:
            return save(state, file)
        with open("/dev/full", "wb") as f:
            save(state, f)

    monkeypatch.setattr(torch, "save", full)
    message = error_of(*flags(base, data, out, steps=8))
    assert "(No space left on device); free some space" in message
    names = [int(p.name[:8]) for p in checkpoint.run_checkpoints(out / "checkpoints")]
    assert names == [0, 2] and not list(out.rglob("*tmp*"))
    monkeypatch.undo()
    resume(out)
    assert_same_run(out, whole)


def test_a_file_size_limit_ends_in_one_sentence(tmp_path, base, data):
    """As a full disk does, but from the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        message = error_of(*flags(base, data, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message
    assert not [p for p in (tmp_path / "out").rglob("*") if ".tmp" in p.name]


WRONG = [(f"--{name}", v) for name in settings.NUMBERS for v in ("-1", "nan", "ten", "")]
WRONG += [(f"--{name}", "other") for name in (*settings.CHOICES, "teacher_reads", "no_such_flag")]
WRONG += [("--lr", "inf"), ("--lr", "1e38"), ("--temperature", "1e-40"), ("--weight_decay", "1e30")]
WRONG += [("--batch_size", "999999999"), ("--temperature", "0.009"), ("--skip_tokens", "64")]
WRONG += [(f"--{name}", path) for name in settings.TEXTS for path in ("a\0b", "a\udcffb")]


def test_every_wrong_value_is_named(capsys):
    """By its flag, before anything is read."""
    for flag, value in WRONG:
        with pytest.raises(SystemExit) as stopped:
            train.main(["--out_dir", "unused", flag, value])
        last = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and "error: " in last and flag in last, (flag, value, last)
    for argv in ([], ["--out_dir", "x", "--teacher_reads", "article", "--teacher_template", "y"]):
        with pytest.raises(SystemExit):
            train.main(argv)


@pytest.mark.parametrize(
    "flag, value, word",
    [
        ("--data", "nowhere.jsonl", "cannot read nowhere.jsonl"),
        ("--data", ROOT, "cannot read"),
        ("--data", os.devnull, "no rows"),
        ("--teacher_template", "nowhere.txt", "cannot read nowhere.txt"),
        ("--init_from", "nowhere", "--init_from nowhere"),
        ("--device", "abacus", "--device abacus"),
        ("--device", "hpu", "--device hpu"),
        ("--device", "meta", "--device meta"),
        ("--out_dir", ROOT / "LICENSE" / "x", "LICENSE"),
        ("--max_new_tokens", 400, "n_positions"),
    ],
)
def test_a_wrong_name_ends_in_one_sentence(flag, value, word, tmp_path, base, data):
    """And nothing is written."""
    assert word in error_of(*flags(base, data, tmp_path / "out", flag, value))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["data", "test", "ood", "eval", "old", "teacher_template"])
def test_a_missing_file_is_noticed_before_the_model_is_read(
    flag, tmp_path, base, data, monkeypatch
):
    """A large one takes its time."""
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("the model was read"))
    message = error_of(*flags(base, data, tmp_path / "out", f"--{flag}", "nope"))
    assert message == "error: cannot read nope (No such file or directory); check the path"


def test_an_error_without_a_number_has_its_words(tmp_path, base, data, monkeypatch):
    """An OSError that no system call raised has no strerror, which would print as None."""

    def broken(path):
        if path == data / "train.jsonl":
            raise OSError("the drive is gone")
        return read(path)

    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", broken)
    message = error_of(*flags(base, data, tmp_path / "out"))
    assert "train.jsonl (the drive is gone); check the path" in message


@pytest.mark.parametrize("flag", ["--data", "--eval", "--init_from", "--out_dir"])
def test_a_symlink_loop_ends_in_one_sentence(flag, tmp_path, base, data):
    """Some of pathlib's functions raise a RuntimeError of their own for it."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in error_of(*flags(base, data, tmp_path / "out", flag, tmp_path / "loop"))


@pytest.mark.parametrize(
    "rank, size", [("abc", "1"), ("0", "0"), ("1", "1"), ("-1", "2"), ("0", ""), ("0", "1e3")]
)
def test_wrong_process_numbers_end_in_one_sentence(rank, size, tmp_path, base, data, monkeypatch):
    """They come from the environment, where anything may stand."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert "unset both" in error_of(*flags(base, data, tmp_path / "out"))


def test_processes_without_torchrun_end_in_one_sentence(tmp_path, base, data, monkeypatch):
    """Nobody has told them where to meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in error_of(*flags(base, data, tmp_path / "out"))


def test_full_memory_ends_in_one_sentence(tmp_path, base, data, monkeypatch):
    """On a CPU PyTorch raises a bare RuntimeError."""
    monkeypatch.setattr(train, "update", lambda *_: torch.empty(10**15))
    assert "the memory is full; lower --micro_batch" in error_of(*flags(base, data, tmp_path / "x"))


def test_processes_must_divide_the_minibatch(tmp_path, base, data, monkeypatch):
    """Equal shares only: a mean over processes would weight rows otherwise."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "multiple of the 3 processes" in error_of(*flags(base, data, tmp_path / "out"))


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_an_explosion_keeps_the_last_checkpoint(method, tmp_path, base, data, monkeypatch):
    """A learning rate of 1e30 in step 3 makes step 4 not finite."""
    rates = {2: 1e30}
    monkeypatch.setattr(settings, "learning_rate", lambda step, *_: rates.get(step, 1e-3))
    message = error_of(*flags(base, data, tmp_path / "out", "--method", method))
    assert re.search(r"step 4: .*; .*/checkpoints/00000002-.* is from before it", message)
    saved = last_checkpoint(tmp_path / "out")
    assert saved["step"] == 2 and all(w.isfinite().all() for w in saved["student"].values())
