"""What gpt2/run.py guarantees about a run's folder: its own, nobody else's, resumed as it was."""

import json
import os
import shutil
import threading

import pytest
import torch

from gpt2 import checkpoint, settings, train
from gpt2.conftest import error_of, flags, last_checkpoint, lines, metrics, small_gpt
from gpt2.run import held


def resume(out):
    train.main(["--resume", "--out_dir", str(out), "--device", "cpu"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, data):
    """A run of two steps, for tests that copy it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train.main(flags(base, data, out, steps=2))
    return out


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def results(out):
    return json.loads((out / "results.json").read_text())


# --- Other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "results.json", *checkpoint.WEIGHT_FILES])
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["start", "resume"])
def test_a_foreign_model_is_not_overwritten(more, name, tmp_path, base, data):
    """Nor results whose checkpoints are gone; --resume starts where there is nothing only."""
    (tmp_path / name).write_text("precious")
    message = error_of(*flags(base, data, tmp_path, *more))
    assert f"already holds {name}" in message and "another --out_dir" in message
    assert content(tmp_path) == {name: b"precious"}


def test_a_run_does_not_overwrite_its_source(base, data):
    """--out_dir is the folder of --init_from, or of the weights file that it names."""
    before, weights = content(base), next(base.glob("*model*"))
    assert "already holds" in error_of(*flags(base, data, base))
    assert "already holds" in error_of(*flags(base, data, base, "--init_from", weights))
    assert content(base) == before


def test_another_models_tokenizer_is_removed(tmp_path, base, data):
    """Left beside the new weights, the next run would take it for theirs."""
    stale = {"vocab.json", "tokenizer.json", "special_tokens_map.json"}
    for name in stale:
        (tmp_path / name).write_text("stale")
    train.main(flags(base, data, tmp_path, steps=1))
    assert (tmp_path / "vocab.json").read_bytes() == (base / "vocab.json").read_bytes()
    assert not stale - {"vocab.json"} & set(content(tmp_path))
    checkpoint.copy_tokenizer(None, tmp_path)  # of a model that is downloaded
    assert not (tmp_path / "vocab.json").exists()


@pytest.mark.parametrize("there", [True, False], ids=["folder", "new folder"])
def test_a_run_has_its_folder_to_itself(there, tmp_path, base, data, monkeypatch):
    """Two would mix their logs and delete each other's checkpoints. The end frees the folder."""
    out, update, tried = tmp_path / "out", train.update, []
    if there:
        out.mkdir()

    def second(run, rows, generators):
        with pytest.raises(ValueError, match="another run is writing to .*out; wait for its end"):
            with held(out):
                pass
        tried.append(run.step)
        return update(run, rows, generators)

    monkeypatch.setattr(train, "update", second)
    train.main(flags(base, data, out, steps=1))
    with held(out):
        assert tried == [0] and "another run" in error_of("--resume", "--out_dir", out)


# --- Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights", "config.json", "vocab.json", "merges.txt"])
def test_resume_notices_a_changed_base(name, tmp_path, base, data):
    """Other weights or tokens would go on to other results without a word."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(base, source)
    train.main(flags(source, data, out, steps=1))
    resume(out)
    if name == "weights":
        checkpoint.save_model(small_gpt(seed=5), source)
    else:
        (source / name).write_text((source / name).read_text() + "\n")
    assert "has changed since the run began" in error_of("--resume", "--out_dir", out)


def test_a_source_that_changes_under_a_run_is_noticed(tmp_path, base, data, monkeypatch):
    """The base is read again at every evaluation; another one would give another KL silently."""
    source, update = tmp_path / "source", train.update
    shutil.copytree(base, source)

    def changes(*arguments):
        checkpoint.save_model(small_gpt(seed=5), source)
        return update(*arguments)

    monkeypatch.setattr(train, "update", changes)
    message = error_of(*flags(source, data, tmp_path / "out"))
    assert "has changed since the run began" in message


def test_resuming_a_finished_run_repeats_no_line(tmp_path, finished, monkeypatch):
    """Nor of a run that was killed between its last evaluation and results.json."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    changed = {"config": {"resume": True, "out_dir": str(out)}}
    for _ in range(2):
        resume(out)
        assert metrics(out) == metrics(finished)
        assert lines(out / "samples.jsonl") == lines(finished / "samples.jsonl")
        for name in ("base", "final", "config"):
            assert results(out)[name] == results(finished)[name] | changed.get(name, {})
    (out / "results.json").unlink()

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(checkpoint, "save_model", killed)
    with pytest.raises(Killed):
        resume(out)
    monkeypatch.undo()
    resume(out)
    assert metrics(out) == metrics(finished) and (out / "results.json").exists()


def change(state, path, value):
    *path, last = path
    for key in path:
        state = state[key]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value


@pytest.mark.parametrize(
    "path, value",
    [
        ([name], value)
        for name in ("args", "step", "inputs", "base_scores", "student", "teacher", "optimizer")
        for value in (KeyError, None, "text", {"a": 1})
        if (name, value) != ("inputs", {"a": 1})  # then the data has changed
    ]
    + [(["step"], value) for value in (-1, 3, 1.0, torch.tensor(1))]
    + [(["args", "kl"], "reverse"), (["args", "divergence"], KeyError), (["more"], 1)]
    + [(["args", "steps"], "2"), (["args", "lr"], 7.0), (["args", "teacher"], "other")]
    + [(["args", "data"], 5), (["base_scores", "exact"], "0.5")]
    + [
        (["student", "wte.weight"], value)
        for value in (KeyError, torch.ones(2), torch.ones(263, 32).int())
    ]
    + [(["optimizer", "state", 0, "exp_avg"], value) for value in (KeyError, None, torch.ones(2))]
    + [(["optimizer", "state"], {}), (["optimizer", "state", 3, "step"], KeyError)],
)
def test_other_programs_checkpoints_are_named(path, value, tmp_path, finished):
    """A right checksum does not tell what is in a checkpoint: an older version's fits no more."""
    state = last_checkpoint(finished)
    change(state, path, value)
    checkpoint.save_run(tmp_path / "checkpoints", {"step": 2})
    (file,) = (tmp_path / "checkpoints").iterdir()
    torch.save(state, file)
    file.rename(file.with_name(f"00000002-{checkpoint.crc32(file)}.pt"))
    message = error_of("--resume", "--out_dir", tmp_path)
    assert "not written by this version of the program; finish the run with that one" in message


def test_an_explosion_names_both_checkpoints(tmp_path, base, data, monkeypatch):
    """Weights of 1e30 are finite, are saved, and end every step after them."""
    out, rates = tmp_path / "out", {3: 1e30}
    monkeypatch.setattr(settings, "learning_rate", lambda step, *_: rates.get(step, 1e-3))
    message = error_of(*flags(base, data, out, "--eval_every", 9, steps=6))
    older, newest = checkpoint.run_checkpoints(out / "checkpoints")
    assert [int(file.name[:8]) for file in (older, newest)] == [2, 4]
    for message in (message, error_of("--resume", "--out_dir", out)):
        assert "step 5: " in message and f"{newest} is from before it" in message
        assert f"delete it and --resume goes on from {older.name}" in message
    newest.unlink()
    monkeypatch.undo()
    resume(out)  # the remedy works
    assert lines(out / "metrics.jsonl")[-1]["step"] == 6


def test_data_may_come_from_a_pipe(tmp_path, base, data):
    """It can be read once only; a second time would wait for ever."""
    pipe, rows = tmp_path / "pipe", (data / "train.jsonl").read_bytes()
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=[rows], daemon=True).start()
    train.main(flags(base, data, tmp_path / "out", "--data", pipe, steps=1))
    threading.Thread(target=pipe.write_bytes, args=[rows + b"\n"], daemon=True).start()
    assert "pipe has changed" in error_of("--resume", "--out_dir", tmp_path / "out")
    assert results(tmp_path / "out")["config"]["data"] == str(pipe)
