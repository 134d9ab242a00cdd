"""What a run records: data/watch.py and data/files.py. Oracles: PyTorch's own, and arithmetic."""

from unittest import mock

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from data import files, watch
from model import GPT, GPTConfig
from sdft import completion_logits, rollout

EOS, DECODE = 0, lambda ids: "".join("abcdefgh"[i] for i in ids)
NEW, PRIOR = [([1, 2], [1, 2, 3, 4]), ([3], [3, 5]), ([6], [5, 6])], [([4, 4], [4, 4])]


def tiny(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=20, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    for p in model.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return model.requires_grad_(False)


MODELS = tiny(0), tiny(1), tiny(2)  # student, teacher, base


def respond(model, prompts, temperature):
    return rollout(model, prompts, 9, EOS, temperature, torch.Generator().manual_seed(0))


def rows(times=1):
    """The third of the new prompts has no expected answer."""
    texts = dict(prompt="p", teacher_prompt="t", demonstration="d")
    ids = [("new", pair) for pair in NEW * times] + [("prior", pair) for pair in PRIOR * times]
    ids = [dict(kind=k, student_ids=x, teacher_ids=xc) for k, (x, xc) in ids]
    return [texts | row | {"expected": None if row["student_ids"] == [6] else "e"} for row in ids]


def look(rows, step=0, models=MODELS, **settings):
    """A response is correct if it ends: then its text does."""
    is_correct = lambda response, expected: response.endswith("a") and expected == "e"
    about = dict(phase="sdft", skill=None, step=step)
    return watch.look(*models, rows, DECODE, is_correct, 9, **{"eos_id": EOS} | settings, **about)


def test_metrics_are_those_of_torch_distributions():
    """Means over the tokens of all new responses, scored row by row without any padding."""
    student, teacher, base = MODELS
    expected = {}
    for name, model, place in (("student", student, 0), ("teacher", teacher, 1)):
        y, mask = respond(model, [pair[place] for pair in NEW + PRIOR], temperature=1 - place)
        y, mask = y[:3], mask[:3]  # the prior row is not counted
        tokens = []
        for (x, hint), ids, length in zip(NEW, y, mask.sum(1)):
            context = [(student, x), (teacher, hint), (base, x)]
            logits = [completion_logits(m, [c], ids[None, :length])[0] for m, c in context]
            p, q, b = (Categorical(logits=logits_of) for logits_of in logits)
            tokens.append(torch.stack([kl_divergence((p, q)[place], b), p.entropy(), q.entropy()]))
        kl, *entropies = torch.cat(tokens, 1).mean(1).tolist()
        ended = (y == EOS).any(1).double()
        expected[f"kl_{name}_base"] = kl
        right = "teacher_accuracy" if place else "rollouts_correct"
        expected[right] = ended[:2].mean().item()  # of the third the answer is unknown
        if name == "student":
            expected |= dict(zip(("student_entropy", "teacher_entropy"), entropies))
            expected |= {"never_ended": 1 - ended.mean().item()}
            expected["response_length"] = mask.sum().item() / 3
    found, _ = look(rows())
    assert found == pytest.approx(expected, rel=1e-4) and found["never_ended"] > 0
    found, _ = look(rows(), batch_size=2)  # greedy responses do not depend on the batch
    for name in ("teacher_accuracy", "kl_teacher_base"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    # Any of several end tokens ends a response, as that of a chat's turn.
    at_zero = lambda *a: rollout(*a[:3], EOS, *a[4:])
    assert look(rows(), eos_id=range(8), rollout=at_zero)[0]["never_ended"] == 0


def test_samples_are_few_and_of_both_roles_and_kinds():
    """Three of each kind; the teacher's own responses before training only."""
    for step, roles in ((0, ["student"] * 6 + ["teacher"] * 6), (7, ["student"] * 6)):
        said = look(rows(4), step, divergence="jsd")[1]
        assert [row["role"] for row in said] == roles
        assert [row["kind"] for row in said] == (["new"] * 3 + ["prior"] * 3) * (len(roles) // 6)
        about = {(row["phase"], row["step"], row["divergence"]) for row in said}
        assert about == {("sdft", step, "jsd")}
        assert all((row["correct"] is None) == (row["expected"] is None) for row in said)
    teacher = look(rows())[1][-1]
    y, _ = respond(MODELS[1], [PRIOR[0][1]], temperature=0)
    assert [t["id"] for t in teacher["tokens"]] == y[0].tolist()[: len(teacher["tokens"])]


def test_without_a_teacher_the_base_judges():
    """SFT: no metric of a teacher, and samples under the base with the demonstration."""
    student, _, base = MODELS
    (found, said), (same, judged) = (look(rows(), models=(student, t, base)) for t in (None, base))
    assert found == {k: v for k, v in same.items() if "teacher" not in k} and said == judged
    assert all(row["role"] == "student" for row in look(rows(), 1, (student, None, base))[1])


def test_a_token_has_the_numbers_of_the_method():
    """Probabilities, divergence in nats, reward, and minus the divergence's slope by the logit."""
    ids, student, teacher = [2, 5, 0], *(3 * torch.randn(2, 3, 8, dtype=torch.float64))
    row = watch.sample_row(ids, student, teacher, DECODE, "forward", step=4)
    assert row["response"] == "cfa" and row["step"] == 4 and row["divergence"] == "forward"
    p, q = Categorical(logits=student.requires_grad_()), Categorical(logits=teacher)
    nats = kl_divergence(q, p)
    (slope,) = torch.autograd.grad(nats.sum(), student)
    for t, (i, token) in enumerate(zip(ids, row["tokens"])):
        p_t, q_t = p.probs[t].detach(), q.probs[t]
        numbers = [p_t[i], q_t[i], nats[t].detach(), (q_t[i] / p_t[i]).log(), -slope[t, i]]
        names = ("student", "teacher", "divergence", "reward", "push")
        assert [token[n] for n in names] == pytest.approx([*map(float, numbers)], 1e-4, 1e-7)
        for name, probs in (("student_top", p_t), ("teacher_top", q_t)):
            likeliest = sorted(range(8), key=lambda i: -probs[i])[:3]
            expected = [[i, "abcdefgh"[i], pytest.approx(float(probs[i]), 1e-4)] for i in likeliest]
            assert token["id"] == i and token["text"] == "abcdefgh"[i] and token[name] == expected


GOOD = dict(teacher_accuracy=0.98, rollouts_correct=0.5, never_ended=0.0, prior=0.9, skill="X")
TROUBLES = [  # on the borders of the bounds, too; SFT has no rollouts
    (dict(teacher_accuracy=0.31), 0, "the teacher answers 31% right"),
    (dict(teacher_accuracy=0.77), 60, "fell from 0.98 to 0.77 since X, step 0: it follows"),
    (dict(rollouts_correct=0.01), 60, "1% of the rollouts are correct after 60 updates, a cold"),
    (dict(rollouts_correct=0.02), 60, None),
    (dict(rollouts_correct=0.0), 0, None),
    (dict(rollouts_correct=0.0, teacher_accuracy=None), 60, None),
    (dict(never_ended=0.25), 0, "25% of the responses never end"),
    (dict(never_ended=0.2), 0, None),
    (dict(prior=0.75), 60, "prior accuracy fell from 0.90 to 0.75 since X, step 0"),
    (dict(prior=0.8), 60, None),
]


@pytest.mark.parametrize("trouble, step, words", TROUBLES)
def test_each_trouble_has_its_own_sentence(trouble, step, words):
    """And only that one; what is within its bound, or was not measured, has none."""
    row = {k: v for k, v in (GOOD | {"step": step} | trouble).items() if v is not None}
    told = watch.warnings([GOOD | {"step": 0}, row] if step else [row])
    assert len(told) == (words is not None) and (words or "") in "".join(told)


def test_a_warning_comes_when_a_trouble_begins():
    """Not as long as it lasts, and again after it was over (at .75); from the last best row."""
    course = [0.7, 0.95, 0.95, 0.74, 0.74, 0.72, 0.75, 0.64, 0.73, 0.3]
    rows = [{"step": i, "teacher_accuracy": a} for i, a in enumerate(course)]
    told = [len(watch.warnings(rows[: i + 1])) for i in range(len(rows))]
    assert told == [0, 0, 0, 1, 0, 0, 0, 1, 0, 1]
    assert "from 0.95 to 0.64 since step 2" in watch.warnings(rows[:8])[0]


def test_lines_are_read_as_written(tmp_path):
    """Separators, lone surrogates and a last line cut off must not damage the other lines."""
    rows = [{"text": "a\u2028b\x85c\r\nd"}, {"text": "\ud800 שלום"}, {"text": "x"}]
    files.append(tmp_path / "s.jsonl", rows[:2])
    files.append(tmp_path / "s.jsonl", rows[2:])
    assert files.read(tmp_path / "s.jsonl") == (rows, 0)
    whole = (tmp_path / "s.jsonl").read_bytes()
    assert "שלום".encode() in whole  # for who looks into it
    (tmp_path / "s.jsonl").write_bytes(whole[:-4] + b"\xe2\n[1]\n\n")
    assert files.read(tmp_path / "s.jsonl") == (rows[:2], 2)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("unexpected pos")])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, error):
    """On the disk before it has its name; what fails leaves the old file, and is one sentence."""
    path, called = tmp_path / "results.json", mock.Mock()
    with mock.patch("os.fsync", called.fsync), mock.patch("os.replace", called.replace):
        files.write_whole(path, lambda tmp: tmp.write_text("new"))
    assert [name for name, *_ in called.mock_calls] == ["fsync", "replace"]
    path.write_text("old")
    mode = path.stat().st_mode
    files.write_whole(path, lambda tmp: tmp.write_text("old") and tmp.chmod(0o600))
    assert path.stat().st_mode == mode  # safetensors hides what it writes from others
    with pytest.raises(OSError, match=r"cannot write .* \((No space left|unexpected pos)\); free"):
        files.write_whole(path, mock.Mock(side_effect=error))
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"


def test_progress_tells_the_mean_since_the_row_before():
    """And at the last step; the seconds are those of the updates alone."""
    rows = [*files.progress(enumerate([4.0, 2.0, 7.0, 1.0, 6.0], 1), steps=5, n_rows=2)]
    assert [(row["step"], row["loss"]) for row, _ in rows] == [(2, 3.0), (4, 4.0), (5, 6.0)]
    assert 0 < rows[0][1] <= rows[1][1] <= rows[2][1]
