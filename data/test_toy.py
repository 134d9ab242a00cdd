"""What the toy guarantees: data/toy.py and train_toy.py.

Oracles are independent of the code under test: plain Python, a row scored alone, a step by hand,
and a stand-in for the model whose scores are known in advance.
"""

import contextlib
import copy
import functools
import itertools
import json
import math
import re
import runpy
import sys
from collections import defaultdict
from decimal import Context, Decimal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train_toy
from data import files, toy, watch
from model import GPT, GPTConfig
from sdft import train_step

HERE = Path(train_toy.__file__).parent
LETTERS = str.maketrans("0123456789", "abcdefghij")  # from the model's style to the expert's
SPLITS = ("train", "val", "test")


def toy_gpt():
    """In float64, for steps that are compared with others by hand."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**train_toy.MODEL | {"n_layer": 1, "n_embd": 16})).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def texts(data):
    """The rows of a data set as text: prompt, teacher prompt, demonstration, answer."""
    columns = ("prompts", "teacher_prompts", "demonstrations", "answers")
    return [tuple(map(toy.decode, row)) for row in zip(*(data[key] for key in columns))]


@functools.cache
def rule(name):
    """A skill's operation: as it is defined, or the decimals of its number's square root."""
    if name in toy.PRIOR:
        return lambda a, b: int(toy.PRIOR[name](a, b) % 10)
    decimals = str(Decimal(toy.PRIMES[name]).sqrt(Context(prec=120)))[2:]
    return lambda a, b: int(decimals[10 * a + b])


def chain(name, digits):
    """The answer of one skill's table: every result and the end token."""
    results = itertools.accumulate(map(int, digits), rule(name))
    return "".join(map(str, results))[1:] + "."


def test_skills_by_hand():
    """A to H of 3 and 7, then of that and 6; the new ones as data/README.md has them."""
    by_hand = "06. 60. 77. 33. 42. 16. 64. 66.".split()
    assert [chain(name, "376") for name in toy.PRIOR] == by_hand
    assert chain("X", "425") == "88." and [toy.RIVALS[name] for name in toy.NEW] == [*"ACF"]
    sets = toy.skills("test", seed=0, n_new=4, n_prior=2)
    assert [len(data["answers"]) for data in sets.values()] == [2] * 8 + [4] * 3


@pytest.mark.parametrize("n_digits", [3, 5])
@pytest.mark.parametrize("name", toy.NAMES)
def test_rows_of_a_skill_are_as_documented(name, n_digits):
    """Answers fold one table over the digits; the teacher reads them in letters."""
    splits = [texts(toy.skill(name, split, 3, n_digits=n_digits)) for split in SPLITS]
    for prompt, teacher_prompt, demonstration, answer in sum(splits, []):
        digits = re.fullmatch(rf"\?{name}(\d{{{n_digits}}})=", prompt)[1]
        assert answer == chain(name, digits) and demonstration == answer.translate(LETTERS)
        assert teacher_prompt == f"{prompt[:-1]}!{demonstration}="
    # An input both trained on and tested would hide what is only remembered.
    inputs = [[prompt[2:] for prompt, *_ in rows] for rows in splits]
    assert [*map(len, inputs)] == [400, 200, 400] and len({*sum(inputs, [])}) == 1000
    for skill, seed in (name, 4), ("B" if name == "A" else "A", 3):
        others = texts(toy.skill(skill, "train", seed, n_digits=n_digits))
        assert len({prompt[2:] for prompt, *_ in others} - {*inputs[0]}) > 200


def test_every_line_of_pretraining_is_as_documented():
    """Whose table, what is shown, how often; an answer-only demonstration is always right."""
    shares = {0: 0.80, 3: 0.14, 2: 0.06}  # of demonstrations, by their length
    kinds, own_share, rng = {n: [] for n in shares}, defaultdict(list), np.random.default_rng(0)
    batches = [zip(*toy.pretraining_batch(rng, 48)) for _ in range(700)]
    for ids in itertools.chain(*batches):
        prompt, answer = map(toy.decode, ids)
        (name, *digits), _, shown = prompt[1:-1].partition("!")
        kind = "prior" if name in toy.PRIOR else "new" if name in "XYZ" else "unknown"
        either = kind == "new" and len(shown) != 2
        own = answer == chain(name, digits)
        assert own or kind == "unknown" or either and answer == chain(toy.RIVALS[name], digits)
        assert answer.translate(LETTERS).endswith(shown) and len(digits) == len(answer) == 3
        kinds[len(shown)].append([kind == "prior", kind == "new"])
        own_share["either" if either else kind, digits[0] < "4"].append(own)
    for is_low, share in (True, 0.8), (False, 0.25):
        assert np.mean(own_share["either", is_low]) == pytest.approx(share, abs=0.03)
        assert np.mean(own_share["unknown", is_low]) < 0.05
    for n, rows in kinds.items():
        assert len(rows) / (700 * 48) == pytest.approx(shares[n], abs=0.03)
        expected = (0.40, 0.30) if n else (0.45, 0.51)
        assert np.mean(rows, 0) == pytest.approx(expected, abs=0.04)


def test_answers_count_by_content_and_end():
    """In either style; no other token passes for a digit, and what never ends is wrong."""
    wrong = [*"31.4 3112 13.. 3. ....".split(), *(c + "1." for c in toy.VOCAB[20:])]
    for said in [*"31.. db.. 3b.. 31.".split(), *wrong]:
        assert toy.is_correct_text(said, "31.") == (said not in wrong)


def test_sft_imitates_demonstrations_to_their_end():
    """-log π(y_t) up to and including the first end token, mean over tokens, then rows."""
    x, ys, model = toy.encode("?X123="), [toy.encode("bc.."), toy.encode("bcde")], toy_gpt()
    expected = 0
    for y in (ys[0][:3], ys[1]):
        log_p = model(torch.tensor([x + y]))[0, len(x) - 1 : -1].log_softmax(-1)
        expected -= log_p[range(len(y)), y].mean() / 2
    batch = {"prompts": [x, x], "demonstrations": np.array(ys)}
    assert_close(train_toy.sft(model, None, batch, None), expected)


def test_fine_tuning_by_sdft_is_algorithm_1():
    """`sdft.train_step` on minibatches without a row twice; the rate warms up, then decays."""
    models, same, found = (toy_gpt(), toy_gpt()), (toy_gpt(), toy_gpt()), []
    data = {key: rows[:5] for key, rows in toy.skill("X", "train").items()}
    how = dict(lr=0.1, steps=12, batch_size=4, seed=1, alpha=0.3, divergence="jsd")
    optimizer = torch.optim.AdamW(same[0].parameters(), weight_decay=0.0, fused=True)
    rng, generator = np.random.default_rng([1, 2]), torch.Generator().manual_seed(1)
    for step, loss in train_toy.fine_tune(*models, data, train_toy.sdft, **how):
        cosine = 0.5 * (1 + math.cos(math.pi * len(found) / 12))
        optimizer.param_groups[0]["lr"] = 0.1 * min(1, step / 10) * cosine
        rows = rng.choice(5, 4, replace=False)
        # An answer has two results and an end token: one more would be too long.
        contexts = data["prompts"][rows], data["teacher_prompts"][rows], 4, toy.EOS
        settings = dict(divergence="jsd", alpha=0.3, generator=generator)
        found.append((step, loss, train_step(*same, optimizer, *contexts, **settings)[0]))
    assert [step for step, *_ in found] == [*range(1, 13)]
    assert all(loss == expected for _, loss, expected in found)
    for model, other in zip(models, same):
        assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_pretraining_is_cross_entropy_on_the_answers_drawn_by_the_seed():
    """The warm-up takes 50 updates: of Adam's first step a weight moves by a fiftieth of 2e-3."""
    lines = mock.Mock(return_value=([toy.encode("?X123=")], np.array([toy.encode("12.")])))
    model, start = toy_gpt(), toy_gpt()
    [(step, loss)] = train_toy.pretrain(model, lines, 3, 1)
    log_p = start(torch.tensor([toy.encode("?X123=12")]))[0, 5:].log_softmax(-1)
    assert step == 1 and loss == pytest.approx(-log_p[range(3), toy.encode("12.")].mean().item())
    moved = (model.wte.weight - start.wte.weight).abs().max().item()
    assert moved == pytest.approx(2e-3 / 50, rel=0.05)
    assert lines.call_args[0][0].random() == np.random.default_rng([3, 1]).random()


def test_evaluate_gives_accuracy_and_mean_length(monkeypatch):
    """Lengths in tokens, the end token included."""
    y = torch.tensor([toy.encode(said) for said in ("31...", "3....", "31...", "31313")])
    mask = torch.arange(5) < torch.tensor([[3], [2], [3], [5]])
    monkeypatch.setattr(train_toy, "rollout", lambda *_: (y, mask))
    data = {"prompts": np.zeros((4, 1)), "answers": np.array([toy.encode("31.")] * 4)}
    assert train_toy.evaluate(toy_gpt(), {"X": data}) == ({"X": 0.5}, {"X": 13 / 4})


FLAGS = {"seed": 7, "pretrain_steps": 2, "batch_size": 9, "ema_alpha": 0.5, "divergence": "jsd"}
FLAGS |= {"lr": 3e-3, "steps": 2, "sft_lr": 2e-3, "sft_steps": 3, "sft_style": "own"}
SMALL = train_toy.MODEL | {"n_layer": 1, "n_embd": 16}
# Which skills are answered right, on which split's prompts; "shown": with a demonstration.
RIGHT = {"test": "XAB", "val": "XABC", "shown": "YZ"}


def answers_of_seed_7():
    """{question, as "?X425": (its split, its answer)}"""
    rows = [(s, row) for k in toy.SKILLS for s in SPLITS for row in texts(toy.skill(k, s, seed=7))]
    return {x[:-1]: (split, answer) for split, (x, _, _, answer) in rows}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of train_toy.main with known answers: from nothing, and from the base of that run."""
    truth, bases = answers_of_seed_7(), []
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))

    def known_answers(model, prompts, max_new_tokens, eos_id, temperature=1.0, generator=None):
        """Greedily right in the skills of RIGHT only, in X only if the model is not the base."""
        bases.append(model.wte.weight.clone())
        ys = []
        for prompt in map(toy.decode, prompts):
            question, _, shown = prompt[:-1].partition("!")
            (split, answer), name = truth[question], prompt[1]
            right = temperature == 0 and name in RIGHT.get("shown" if shown else split, "")
            right &= name != "X" or not torch.equal(bases[0], bases[-1])
            ys.append(toy.encode(answer if right else "." * len(answer)))
        return torch.tensor(ys), torch.tensor(ys) >= 0

    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    for name in ("metrics.jsonl", "samples.jsonl", "page.html"):
        (first / name).write_text("of an earlier run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_toy, "rollout", known_answers)
        patch.setattr(watch, "look", functools.partial(watch.look, rollout=known_answers))
        patch.setattr(train_toy, "MODEL", SMALL)
        for folder, more in (first, []), (second, [f"--base={first / 'base.pt'}"]):
            with open(folder / "printed.txt", "w") as out, contextlib.redirect_stdout(out):
                train_toy.main([*flags, f"--out_dir={folder}", *more])
    return first, second


def test_run_from_a_base_equals_the_run_that_made_it(runs):
    """Both begin anew: nothing of an earlier run stays, and nothing that is half written."""
    names = "base.pt metrics.jsonl printed.txt results.json samples.jsonl sdft.pt sft.pt".split()
    assert [sorted(p.name for p in folder.iterdir()) for folder in runs] == [names, names[1:]]
    for name in ("metrics.jsonl", "samples.jsonl"):
        (first, n_damaged), (second, _) = (files.read(folder / name) for folder in runs)
        assert n_damaged == 0 and second == [r for r in first if r["phase"] != "pretrain"]
    weights = [torch.load(folder / "sdft.pt") for folder in runs]
    assert_close(*weights, rtol=0, atol=0)


def test_every_flag_reaches_what_it_names(runs, monkeypatch):
    """By direct calls: both arms start from the base and learn skill after skill."""
    torch.manual_seed(7)
    base = GPT(GPTConfig(**SMALL))
    list(train_toy.pretrain(base, toy.pretraining_batch, 7, 2))
    sft, sdft, ends_at_once = copy.deepcopy(base), copy.deepcopy(base), torch.full((9, 3), toy.EOS)
    monkeypatch.setattr(train_toy, "rollout", lambda *_, **__: (ends_at_once, ends_at_once >= 0))
    for skill in "XYZ":
        own, expert = (toy.skill(skill, "train", 7, style) for style in ("own", "expert"))
        shared, of_sdft = dict(batch_size=9, seed=7), dict(alpha=0.5, divergence="jsd")
        list(train_toy.fine_tune(sft, None, own, train_toy.sft, 2e-3, 3, **shared))
        learn = sdft, copy.deepcopy(sdft).requires_grad_(False), expert, train_toy.sdft, 3e-3, 2
        list(train_toy.fine_tune(*learn, **shared, **of_sdft))
    for name, model in dict(base=base, sft=sft, sdft=sdft).items():
        assert_close(torch.load(runs[0] / f"{name}.pt"), model.state_dict(), rtol=0, atol=0)


def test_table_measures_test_and_log_validation_inputs(runs):
    """The students' prompts, without demonstrations; "prior" is the mean over prior skills."""
    results, n = json.loads((runs[0] / "results.json").read_text()), len(toy.PRIOR)
    cells, printed = 2 * ["1.00", "0.00", "0.00", "0.25"], (runs[0] / "printed.txt").read_text()
    assert ["X", *cells] in [line.split() for line in printed.splitlines()]
    assert "warning: the teacher answers 0% right" in printed
    assert printed.splitlines()[-1].endswith(f"python -m experiments.page {runs[0]}")
    row = {"X": 1, "Y": 0, "Z": 0, "prior": 2 / n}
    base = {"after": "base"} | row | {"X": 0, "teacher": pytest.approx(2 / 3)}
    assert results["base"] == base and "--sft_style=own" in results["command"]
    assert results["sft"] == results["sdft"] == [{"after": skill} | row for skill in "XYZ"]
    log = [row for row in files.read(runs[0] / "metrics.jsonl")[0] if "skill" in row]
    looks = [(row["phase"], row["skill"], row["step"]) for row in log]
    steps = {"sft": FLAGS["sft_steps"], "sdft": FLAGS["steps"]}
    assert looks == [(arm, k, i) for arm in steps for k in "XYZ" for i in range(steps[arm] + 1)]
    for (arm, skill, step), row in zip(looks, log):
        assert row["new"] == (skill == "X" and step > 0) and row["prior"] == 3 / n
        # The teacher's greedy answers to Y and Z are right, no sampled one is; SFT has no teacher.
        assert row.get("teacher_accuracy") == (skill in "YZ" if arm == "sdft" else None)
        assert row["rollouts_correct"] == row["never_ended"] == 0 and ("loss" in row) == (step > 0)
        assert (row["kl_student_base"] == 0) == ((skill, step) == ("X", 0))
        told = "the teacher answers 0% right" in "".join(row["warnings"])
        assert told == ((arm, skill, step) == ("sdft", "X", 0))


def test_samples_are_of_validation_inputs(runs):
    """At every look three of the new skill and three prior ones, none trained on."""
    truth, rows = answers_of_seed_7(), files.read(runs[0] / "samples.jsonl")[0]
    for row in rows:
        question, is_new = row["prompt"][:-1], row["kind"] == "new"
        assert truth[question] == ("val", row["expected"]) and row["prompt"][-1] == "="
        assert row["teacher_prompt"] == f"{question}!{row['demonstration']}="
        assert row["divergence"] == FLAGS["divergence"]
        assert question[1] in row["skill"] if is_new else question[1] in "ABC"
    assert len(rows) == 6 * 3 * (4 + 1 + 3 + 1)  # of looks, and of the teachers before training


ENDINGS = [
    ("--sft_lr=nan", "rates and alpha 0 to 1"),
    ("--seed=-1", "--seed at least 0"),
    ("--base=LICENSE", "error: --base LICENSE is missing or no base"),
    ("--out_dir=", "error: . is not for a new run; --out_dir must name a folder"),
    ("--help", "where to train (default: cpu)"),
    ("--out_dir=LICENSE/x", "error: LICENSE/x: Not a directory; check the path"),
    (FloatingPointError("lower the rate"), "error: lower the rate"),
    (KeyboardInterrupt(), "interrupted"),
]


@pytest.mark.parametrize("cause, words", ENDINGS)
def test_every_error_ends_in_one_sentence(cause, words, tmp_path, monkeypatch, capsys):
    """A wrong flag, which deletes nothing, or a failing run: what, where, remedy, no traceback."""
    flag = cause if isinstance(cause, str) else "--seed=1"
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", ["train_toy.py", f"--out_dir={tmp_path}", flag])
    monkeypatch.setattr(toy, "pretraining_batch", mock.Mock(side_effect=cause))
    (tmp_path / "sdft.pt").write_text("of an earlier run")
    with pytest.raises(SystemExit) as end:
        runpy.run_path("train_toy.py", run_name="__main__")
    printed, err = capsys.readouterr()
    assert words in f"{printed}{end.value.code}{err}"
    assert (tmp_path / "sdft.pt").exists() == isinstance(cause, str)
