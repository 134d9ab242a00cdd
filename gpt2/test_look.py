"""What gpt2/look.py guarantees: samples, warnings, and the weights of the best evaluation."""

import json
import shlex

import pytest
import torch

from gpt2 import checkpoint, evaluate, look, settings, train
from gpt2.conftest import (
    EOS,
    error_of,
    flags,
    lines,
    small_gpt,
    weights,
    write_rows,
    write_vocabulary,
)
from gpt2.data import load_encoding
from sdft import completion_logits, implicit_reward, rollout, teacher_context, token_divergence


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, data):
    out = tmp_path_factory.mktemp("look") / "out"
    train.main(flags(base, data, out, "--skip_long"))
    return out


def test_samples_are_of_the_same_prompts_before_during_and_after(run):
    """Three of the training rows, with all that either role reads, and the prior question."""
    rows = [row for row in lines(run / "samples.jsonl") if row["role"] == "student"]
    for step in (0, 2, 4):
        a, b, c, prior = (row for row in rows if row["step"] == step)
        for i, row in enumerate((a, b, c)):
            prompt, demonstration = f"What is {i}?\n", f"It is {i} {'x' * (i % 4)}"
            read = f"Article {i}.\n\n{teacher_context(prompt, demonstration)}"
            assert [row[k] for k in ("prompt", "teacher_prompt")] == [prompt, read]
            assert [row[k] for k in ("demonstration", "expected")] == [demonstration, str(i)]
        assert prior["prompt"] == prior["teacher_prompt"] == "one, two"
        assert prior["expected"] == ", three" and prior["demonstration"] == ""
    assert len(rows) == 12
    assert {row["step"] for row in lines(run / "samples.jsonl") if row["role"] == "teacher"} == {0}


def test_tokens_have_the_numbers_of_the_final_models(run):
    """Oracle: sdft.py on the files' own weights and texts, row by row."""
    enc, student = load_encoding(run), checkpoint.load_model(str(run))
    saved = checkpoint.load_run(run / "checkpoints")
    teacher = checkpoint.load_model(str(run))
    teacher.load_state_dict(saved["teacher"])
    for row in [row for row in lines(run / "samples.jsonl") if row["step"] == 4]:
        ids = torch.tensor([[token["id"] for token in row["tokens"]]])
        text = b"".join(enc.decode_single_token_bytes(int(i)) for i in ids[0] if i != EOS)
        assert row["response"] == text.decode("utf-8", "backslashreplace") or len(ids[0]) == 1
        contexts = [(student, row["prompt"]), (teacher, row["teacher_prompt"])]
        p, q = (completion_logits(m, [enc.encode_ordinary(text)], ids) for m, text in contexts)
        numbers = torch.stack([token_divergence(p, q)[0], implicit_reward(p, q, ids)[0]], 1)
        found = [[token["divergence"], token["reward"]] for token in row["tokens"]]
        torch.testing.assert_close(torch.tensor(found), numbers.detach(), rtol=1e-3, atol=1e-4)


def test_responses_are_sampled_with_fixed_random_numbers(tmp_path):
    """The same models give the same samples at any step; another seed gives others."""
    model, enc = small_gpt(ends=3.0), write_vocabulary(tmp_path)
    args = settings.parse_args("", ["--out_dir", ".", "--max_new_tokens", "6"])[0]
    row = {"prompt_ids": [5, 6], "teacher_ids": [5, 6, 7], "answer": None}
    sets = {"train": [row] * 3, "prior": [{"prompt_ids": [8], "answer_ids": [9]}]}
    said = {}
    for step, seed in ((0, 0), (3, 0), (3, 1)):
        args.seed = seed
        rows = look.look((model, model, model), sets, enc, args, step)[1]
        said[step, seed] = [row["response"] for row in rows if row["role"] == "student"]
    assert said[0, 0] == said[3, 0] != said[3, 1]
    args.temperature, args.divergence = 0.0, "forward"
    row = look.look((model, model, model), sets, enc, args, 3)[1][0]
    greedy, mask = rollout(model, [[5, 6]], 6, EOS, temperature=0)
    assert [token["id"] for token in row["tokens"]] == greedy[mask].tolist()
    assert row["divergence"] == "forward"
    sets["prior"][0]["prompt_ids"] = [8] * 315  # no room for six tokens in 320
    rows = look.look((model, model, model), sets, enc, args, 3)[1]
    assert {row["kind"] for row in rows} == {"new"}


def test_a_useless_teacher_is_told_before_training(base, data, tmp_path, capsys):
    """On the screen and in metrics.jsonl; SFT has no teacher."""
    for method, told in (("sdft", True), ("sft", False)):
        out = tmp_path / method
        train.main(flags(base, data, out, "--method", method, steps=1))
        printed = capsys.readouterr().out.splitlines()
        sentences = [s for row in lines(out / "metrics.jsonl") for s in row.get("warnings", [])]
        assert [f"warning: {s}" for s in sentences] == [s for s in printed if "warning" in s]
        assert any("the teacher answers 0% right" in s for s in sentences) == told


class Killed(BaseException):
    """Nothing catches it."""


def test_keep_best_keeps_the_best_evaluation(base, data, tmp_path, monkeypatch):
    """Not the base's, not a later one that is only as good, and not the last; also if resumed."""
    out, scores, states = tmp_path / "out", [0.9, 0.5, 0.7, Killed, 0.7, 0.6], []

    def scripted(model, *_):
        score = scores.pop(0)
        if score is Killed:
            raise Killed
        assert states[1:] or not (out / "best").exists()
        states.append({k: w.clone() for k, w in model.state_dict().items()})
        return {"lenient": score}

    monkeypatch.setattr(evaluate, "evaluate", scripted)
    with pytest.raises(Killed):
        train.main(flags(base, data, out, "--keep", "best", steps=8))
    train.main(["--resume", "--out_dir", str(out), "--device", "cpu"])
    assert scores == []
    # The model that is evaluated has packed matrices; embeddings and norms tell which it was.
    for folder, state in ((out / "best", states[2]), (out, states[4])):
        saved = weights(folder)
        torch.testing.assert_close({name: saved[name] for name in state}, state, rtol=0, atol=0)
    assert (out / "best" / "vocab.json").read_bytes() == (base / "vocab.json").read_bytes()


def test_keep_best_without_a_score_is_refused(base, data, tmp_path):
    """And without the flag nothing but the last weights is kept."""
    rows = [{"prompt": "Q\n", "demonstration": "D"}]
    more = ["--keep", "best", "--data", write_rows(tmp_path / "d.jsonl", rows)]
    assert "--keep best needs a score: name --test" in error_of(
        *flags(base, data, tmp_path / "out", *more)
    )
    train.main(flags(base, data, tmp_path / "last", steps=1))
    assert not (tmp_path / "last" / "best").exists()


def test_results_name_the_command_of_the_run(run, base, data):
    """Parsed again it gives the run's settings."""
    results = json.loads((run / "results.json").read_text())
    words = shlex.split(results["command"])
    assert words[:3] == ["python", "-m", "gpt2.train"]
    assert vars(settings.parse_args("", words[3:])[0]) == results["config"]


def test_a_command_names_several_files():
    """A flag of several values, and one with a space in its name."""
    args, _ = settings.parse_args("", ["--out_dir", "o", "--old", "a b.jsonl", "c.jsonl"])
    words = shlex.split(settings.command(args))
    assert vars(settings.parse_args("", words[3:])[0]) == vars(args)
