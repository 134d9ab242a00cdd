"""What a run records: data/watch.py and data/files.py. Oracles: PyTorch's own, and arithmetic."""

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


def respond(model, prompts, temperature):
    return rollout(model, prompts, 9, EOS, temperature, torch.Generator().manual_seed(0))


def rows(n=1):
    out = []
    for kind, pairs in (("new", NEW * n), ("prior", PRIOR * n)):
        for student_ids, teacher_ids in pairs:
            row = dict(kind=kind, prompt="p", teacher_prompt="t", demonstration="d", expected="e")
            out.append(row | dict(student_ids=student_ids, teacher_ids=teacher_ids))
    return out


def look(models, rows, step=0, batch_size=64, **settings):
    """A response is correct if it ends: then its text does."""
    about = dict(phase="sdft", skill=None, step=step, batch_size=batch_size)
    is_correct = lambda response, expected: response.endswith("a") and expected == "e"
    return watch.look(*models, rows, DECODE, is_correct, 9, EOS, **about | settings)


@pytest.fixture(scope="module")
def models():
    return tiny(0), tiny(1), tiny(2)


def test_metrics_are_those_of_torch_distributions(models):
    """Means over the tokens of all new responses, scored row by row without any padding."""
    student, teacher, base = models
    expected = {}
    for name, model, place in (("student", student, 0), ("teacher", teacher, 1)):
        y, mask = respond(model, [pair[place] for pair in NEW], temperature=1 - place)
        tokens = []
        for (x, hint), ids, n in zip(NEW, y, mask.sum(1)):
            context = [(student, x), (teacher, hint), (base, x)]
            logits = [completion_logits(m, [c], ids[None, :n])[0] for m, c in context]
            p, q, b = (Categorical(logits=logits_of) for logits_of in logits)
            kl = kl_divergence((p, q)[place], b)
            tokens.append(torch.stack([kl, p.entropy(), q.entropy()]))
        kl, *entropies = torch.cat(tokens, 1).mean(1).tolist()
        ended = [EOS in ids for ids in y.tolist()]
        expected[f"kl_{name}_base"] = kl
        if name == "student":
            expected |= dict(zip(("student_entropy", "teacher_entropy"), entropies))
            expected |= {"rollouts_correct": sum(ended) / 3, "never_ended": 1 - sum(ended) / 3}
            expected["response_length"] = mask.sum().item() / 3
        else:
            expected["teacher_accuracy"] = sum(ended) / 3
    found, _ = look(models, rows()[:3])
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < found["never_ended"] < 1 and len({*expected.values()}) >= 7


def test_a_look_does_not_depend_on_the_batch(models):
    """Greedy responses, rows at a time, and the prior rows beside them."""
    alone, together = look(models, rows()[:3], batch_size=1)[0], look(models, rows())[0]
    same = ("teacher_accuracy", "kl_teacher_base")
    assert [alone[k] for k in same] == pytest.approx([together[k] for k in same], rel=1e-4)


def test_any_of_several_end_tokens_ends_a_response(models):
    """As the end of a chat's turn beside the end of a text."""
    assert look(models, rows()[:3])[0]["never_ended"] > 0
    some = watch.look(
        *models,
        rows()[:3],
        DECODE,
        lambda *_: True,
        9,
        range(8),
        step=0,
        rollout=lambda *a: rollout(*a[:3], EOS, *a[4:]),
    )
    assert some[0]["never_ended"] == 0


def test_samples_are_few_and_of_both_roles_and_kinds(models):
    """Three of each kind; the teacher's own responses before training only."""
    for step, roles in ((0, ["student"] * 6 + ["teacher"] * 6), (7, ["student"] * 6)):
        said = look(models, rows(n=4), step)[1]
        assert [row["role"] for row in said] == roles
        assert [row["kind"] for row in said] == (["new"] * 3 + ["prior"] * 3) * (len(roles) // 6)
        assert all(row["step"] == step and row["phase"] == "sdft" for row in said)
    teacher = look(models, rows())[1][-1]
    y, _ = respond(models[1], [PRIOR[0][1]], temperature=0)
    assert [t["id"] for t in teacher["tokens"]] == y[0].tolist()[: len(teacher["tokens"])]


def test_without_a_teacher_the_base_judges(models):
    """SFT: no metric of a teacher, and samples under the base with the demonstration."""
    student, _, base = models
    found, said = look((student, None, base), rows())
    assert not any("teacher" in name for name in found)
    same, judged = look((student, base, base), rows())
    assert {k: v for k, v in same.items() if "teacher" not in k} == found and said == judged
    assert all(row["role"] == "student" for row in look((student, None, base), rows(), 1)[1])


def test_what_is_unknown_is_left_out(models):
    """Rows without an expected answer have no accuracy, and samples are neither right nor wrong."""
    found, said = look(models, [row | {"expected": None} for row in rows()])
    assert "rollouts_correct" not in found and "teacher_accuracy" not in found
    assert "kl_teacher_base" in found and {row["correct"] for row in said} == {None}


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_a_token_has_the_numbers_of_the_method(divergence):
    """Probabilities, divergence in nats, reward, and minus the divergence's slope by the logit."""
    ids, student, teacher = [2, 5, 0], *(3 * torch.randn(2, 3, 8, dtype=torch.float64))
    row = watch.sample_row(ids, student, teacher, DECODE, divergence, step=4)
    assert row["response"] == "cfa" and row["step"] == 4 and row["divergence"] == divergence

    def nats(t, logits):
        p, q = Categorical(logits=logits), Categorical(logits=teacher[t])
        m = Categorical(probs=(p.probs + q.probs) / 2)
        both = (kl_divergence(p, m) + kl_divergence(q, m)) / 2
        return {"reverse": kl_divergence(p, q), "forward": kl_divergence(q, p), "jsd": both}[
            divergence
        ].item()

    for t, (i, token) in enumerate(zip(ids, row["tokens"])):
        p, q, nudge = student[t].softmax(-1), teacher[t].softmax(-1), torch.zeros(8).double()
        nudge[i] = 1e-5
        push = (nats(t, student[t] - nudge) - nats(t, student[t] + nudge)) / 2e-5
        numbers = [p[i], q[i], nats(t, student[t]), (q[i] / p[i]).log(), push]
        names = ("student", "teacher", "divergence", "reward", "push")
        assert [token[n] for n in names] == pytest.approx([*map(float, numbers)], 1e-4, 1e-7)
        for name, probs in (("student_top", p), ("teacher_top", q)):
            likeliest = sorted(range(8), key=lambda i: -probs[i])[:3]
            expected = [[i, "abcdefgh"[i], pytest.approx(float(probs[i]), 1e-4)] for i in likeliest]
            assert token[name] == expected


GOOD = dict(teacher_accuracy=0.98, rollouts_correct=0.5, never_ended=0.0, prior=0.9)
TROUBLES = [
    (dict(teacher_accuracy=0.31), 0, "the teacher answers 31% right"),
    (dict(teacher_accuracy=0.77), 60, "fell from 0.98 to 0.77 since X, step 0: it follows"),
    (dict(rollouts_correct=0.01), 60, "1% of the rollouts are correct after 60 updates, a cold"),
    (dict(never_ended=0.25), 0, "25% of the responses never end"),
    (dict(prior=0.75), 60, "prior accuracy fell from 0.90 to 0.75 since X, step 0"),
]


@pytest.mark.parametrize("trouble, step, words", TROUBLES)
def test_each_trouble_has_its_own_sentence(trouble, step, words):
    """And only that one; a good row has none."""
    good = GOOD | {"step": 0, "skill": "X"}
    history = [good] if step else []
    (sentence,) = watch.warnings([*history, good | {"step": step} | trouble])
    assert words in sentence
    assert watch.warnings([good, good | {"step": 60}]) == []


@pytest.mark.parametrize(
    "trouble", [dict(teacher_accuracy=0.79), dict(rollouts_correct=0.02), dict(prior=0.81)]
)
def test_within_a_bound_nothing_is_said(trouble):
    """Nor of what was not measured, nor of a cold start before the first update or without one."""
    good = GOOD | {"step": 0}
    assert watch.warnings([good, good | {"step": 1} | trouble]) == []
    assert watch.warnings([{"step": 5}, {"step": 6, "never_ended": 0.2}]) == []
    assert watch.warnings([good | {"rollouts_correct": 0}]) == []
    assert watch.warnings([{"step": 5, "rollouts_correct": 0}]) == []  # SFT


def test_a_warning_comes_when_a_trouble_begins():
    """Not as long as it lasts, and again after it was over; counted from the last best row."""
    course = [0.7, 0.95, 0.95, 0.74, 0.74, 0.72, 0.80, 0.64, 0.73, 0.3]
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
    (tmp_path / "s.jsonl").write_bytes(whole[:-4] + b"\xe2\n[1]\n\n")
    assert files.read(tmp_path / "s.jsonl") == (rows[:2], 2)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("odd")])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, error):
    """What fails leaves the old file and nothing beside it, and is one sentence."""
    path = tmp_path / "results.json"
    files.write_whole(path, lambda tmp: tmp.write_text("old"))

    def fails(tmp):
        tmp.write_text("ne")
        raise error

    with pytest.raises(OSError, match="cannot write .*(No space left|odd).*; free some space"):
        files.write_whole(path, fails)
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"
