"""What the toy guarantees: data/toy.py, data/scoring.py and train_toy.py. On a CPU, offline.

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
import shlex
import sys
from decimal import Decimal, localcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train_toy
from data import samples, scoring, toy
from experiments import page
from model import GPT, GPTConfig
from sdft import train_step

HERE = Path(train_toy.__file__).parent
LETTERS = str.maketrans("0123456789", "abcdefghij")  # from the model's style to the expert's
SPLITS = ("train", "val", "test")
seeded = lambda seed: torch.Generator().manual_seed(seed)


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


BY_HAND = {  # the prior skills in plain Python
    "A": lambda a, b: (a + b) % 10,
    "B": lambda a, b: (a - b) % 10,
    "C": max,
    "D": min,
    "E": lambda a, b: abs(a - b),
    "F": lambda a, b: a * b % 10,
    "G": lambda a, b: (3 * a + b) % 10,
    "H": lambda a, b: 9 - a if b % 2 else a,
}
NEW = dict(zip("XYZMNOPQRSTUVW", (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)))
RIVALS = dict(zip("XYZMNOPQRSTUVW", "ACFBDEGHACFBDE"))


@functools.cache
def rule(name):
    """A skill's operation: by hand, or the decimals of its number's square root."""
    with localcontext() as context:
        context.prec = 120
        decimals = str(Decimal(NEW.get(name, 2)).sqrt())[2:]
    return BY_HAND.get(name, lambda a, b: int(decimals[10 * a + b]))


def chain(name, digits):
    """The answer of one skill's table: every result and the end token."""
    results = itertools.accumulate(map(int, digits), rule(name))
    return "".join(map(str, results))[1:] + "."


@pytest.mark.parametrize("n_digits", [3, 5])
@pytest.mark.parametrize("name", toy.NAMES)
def test_answers_fold_one_table_over_the_digits(name, n_digits):
    """A result depends on the one before it and the next digit."""
    for prompt, _, _, answer in texts(toy.skill(name, "train", n_digits=n_digits)):
        digits = re.fullmatch(rf"\?{name}(\d{{{n_digits}}})=", prompt)[1]
        assert answer == chain(name, digits)


@pytest.mark.parametrize("data", [toy.skill("X", "val"), toy.skill("Q", "val", 1, n_digits=5)])
def test_teacher_prompts_show_the_answer_in_letters(data):
    """The question that the student reads, with the expert's demonstration for it."""
    for prompt, teacher_prompt, demonstration, answer in texts(data):
        assert teacher_prompt == f"{prompt[:-1]}!{demonstration}="
        assert demonstration == answer.translate(LETTERS)


@pytest.mark.parametrize("name, n_digits", [*itertools.product("AXR", (3, 5))])
def test_splits_are_disjoint_and_depend_on_seed(name, n_digits):
    """An input both trained on and tested would hide what is only remembered."""
    drawn = [texts(toy.skill(name, split, 3, n_digits=n_digits)) for split in SPLITS]
    assert [*map(len, drawn)] == [400, 200, 400]
    drawn = [[prompt for prompt, *_ in rows] for rows in drawn]
    assert len(set(sum(drawn, []))) == 1000
    other = {prompt for prompt, *_ in texts(toy.skill(name, "train", 4, n_digits=n_digits))}
    assert len(other - {*drawn[0]}) > 200


def lines_of(batch, batches, n, **world):
    """Lines of pretraining: the question, what a demonstration shows, or "", and the answer."""
    rng = np.random.default_rng(0)
    for _ in range(batches):
        for prompt, answer in zip(*(map(toy.decode, rows) for rows in batch(rng, n, **world))):
            question, _, shown = prompt[1:-1].partition("!")
            yield question, shown, answer


def cold(seed):
    """The levels of R to V move on by one place with every seed."""
    levels = [0, 0.03, 0.1, 0.3, 0.6] * 2
    return dict(zip("RSTUV", levels[seed % 5 :]))


@pytest.mark.parametrize("seed", [0, 3])
def test_rivals_share_a_skill_by_first_digit(seed):
    """HALF: own 80% of the time for 0 to 3, otherwise 25%; COLD: by the seed's level alone.

    A whole answer is one of the two tables'. Of W neither is told.
    """
    given, expected, new = {}, {"W": {True: 0, False: 0}}, toy.many_skills(seed)
    expected |= {name: {True: 0.8, False: 0.25} for name in "XYZMNOPQ"}
    expected |= {name: {True: p, False: p} for name, p in cold(seed).items()}
    for (name, *digits), shown, answer in lines_of(toy.rivals_batch, 120, 256, new=new):
        if not shown and name in expected:
            told = [answer == chain(which, digits) for which in (name, RIVALS[name])]
            given.setdefault((name, digits[0] < "4"), []).append(told)
    assert len(given) == 2 * len(expected)
    for (name, low), told in given.items():
        own, rival = np.mean(told, 0)
        assert own == pytest.approx(expected[name][low], abs=0.1), name
        # Now and then both are right, by chance.
        assert own + rival == pytest.approx(0 if name == "W" else 1, abs=0.06), name


LONG = dict(new={"X": (0.8, 0.25)}, n_digits=5, styles=(0.66, 0.12, 0.22))


@pytest.mark.parametrize(
    "world, new, styles", [({}, "XYZ", (0.8, 0.14, 0.06)), (LONG, "X", LONG["styles"])]
)
def test_every_line_of_pretraining_is_as_documented(world, new, styles):
    """Whose table, how many digits, what is shown, how often; a bare answer is always right."""
    counts, unknown = {"": [], "full": [], "bare": []}, []
    for (name, *digits), shown, answer in lines_of(toy.rivals_batch, 700, 48, **world):
        style = "bare" if len(shown) == 2 else "full" if shown else ""
        assert len(digits) == len(answer) == world.get("n_digits", 3)
        assert answer.translate(LETTERS).endswith(shown) and len(shown) in (0, 2, len(answer))
        own = answer == chain(name, digits)
        if name not in [*BY_HAND, *new]:
            unknown.append(own)
        elif name in BY_HAND or style == "bare":
            assert own
        else:
            assert own or answer == chain(RIVALS[name], digits)
        counts[style].append([name in BY_HAND, name in new])
    total = sum(map(len, counts.values()))
    assert np.mean(unknown) < 0.05
    for style, share in zip(counts, styles):
        kinds = (0.40, 0.30) if style else (0.45, 0.51)
        assert len(counts[style]) / total == pytest.approx(share, abs=0.05)
        assert np.mean(counts[style], 0) == pytest.approx(kinds, abs=0.04)


def attributes_by_part(seed):
    """{part: {entity: its two digits}}, from the answers to both questions, which must agree."""
    found = {part: {} for part in toy.FACTS}
    for part, question in itertools.product(toy.FACTS, "AB"):
        for prompt, _, _, answer in texts(toy.facts(part, seed, question)):
            entity, name = re.fullmatch(r"\?([a-j]{2})([AB])=", prompt).groups()
            assert name == question
            assert found[part].setdefault(entity, answer[:2]) == answer[:2]
            assert int(answer[2]) == rule(question)(int(answer[0]), int(answer[1]))
    return found


def test_facts_ask_entities_first_and_parts_share_none():
    """Facts to learn, to choose settings by and to keep cover all entities; the seed matters."""
    found = attributes_by_part(3)
    assert [len(found[part]) for part in ("known", "new", "val")] == [60, 20, 20]
    assert len({entity for part in found.values() for entity in part}) == 100
    assert found != attributes_by_part(4)


@pytest.mark.parametrize("reads, start, end", [("article", 0, 2), ("answer", 2, 3), ("both", 0, 3)])
def test_the_teacher_reads_the_named_text(reads, start, end):
    """The attributes, the result, or both, in letters; the demonstrations are always full."""
    for prompt, teacher_prompt, demonstration, answer in texts(toy.facts("new", reads=reads)):
        told = answer.translate(LETTERS)
        assert teacher_prompt == f"{prompt[:-1]}!{told[start:end]}.=" and demonstration == told


def test_pretraining_tells_known_facts_alone():
    """60 entities are as they are, 40 anew every time; a text holds part of the answer."""
    known, asked, guesses = attributes_by_part(0), [], []
    others = known["new"] | known["val"]
    for question, shown, answer in lines_of(toy.facts_batch, 100, 64, seed=0):
        entity, is_known = question[:2], question[:2] in known["known"]
        assert int(answer[2]) == rule(question[2])(int(answer[0]), int(answer[1]))
        assert shown.strip(".") in answer.translate(LETTERS)
        assert not is_known or answer[:2] == known["known"][entity]
        guesses += [] if is_known else [answer[:2] == others[entity]]
        asked.append((shown != "", is_known))
    assert np.mean(guesses) < 0.03
    for with_text, share in [(False, 0.7), (True, 0.25)]:
        known_share = np.mean([is_known for text, is_known in asked if text == with_text])
        assert known_share == pytest.approx(share, abs=0.04)


SCORES = [
    (toy.is_correct, "31.", "31.. db.. 3b.. 31.", "31.4 3112 13.. 3. ...."),
    (toy.is_correct, "31.", "", " ".join(c + "1." for c in toy.VOCAB[20:])),
    (toy.is_last_correct, "31.", "31.. b... 741.", "74211 13.. ...."),
    (toy.is_last_correct, "31.", "", " ".join("3" + c + "." for c in toy.VOCAB[20:] if c != ".")),
    (scoring.is_exact, "Ohr", "ohr. Ohr", "Ohrs It_is_Ohr"),
    (scoring.contains, "Lake Ohr", "It_is_lake_Ohr,_I_think.", "Lake_of_Ohr Flake_Ohr Ohr"),
    (scoring.contains, "!", "!", "No! Yes ?"),
]


@pytest.mark.parametrize("correct, answer, right, wrong", SCORES)
def test_scores_count_content_that_ends(correct, answer, right, wrong):
    """In either style; no other token passes for a digit, and what never ends is wrong."""
    read = str if correct.__module__ == "data.scoring" else lambda t: np.array([toy.encode(t)])
    for said in (right + " " + wrong).split():
        assert bool(correct(read(said.replace("_", " ")), read(answer))) == (said in right.split())


def test_sft_step_imitates_demonstrations_to_their_end():
    """-log π(y_t) up to and including the first end token; SGD, clipped at norm 1, by hand."""
    x, ys, model = toy.encode("?X123="), [toy.encode("bc.."), toy.encode("bcde")], toy_gpt()
    batch, loss = {"prompts": [x, x], "demonstrations": np.array(ys)}, 0
    for y in (ys[0][:3], ys[1]):
        log_p = model(torch.tensor([x + y]))[0, len(x) - 1 : -1].log_softmax(-1)
        loss -= log_p[range(len(y)), y].mean() / 2
    grads = torch.autograd.grad(loss, [*model.parameters()])
    norm = torch.cat([g.flatten() for g in grads]).norm()
    new = [p.detach() - 0.1 / norm * g for p, g in zip(model.parameters(), grads)]
    got = train_toy.sft_step(model, None, torch.optim.SGD(model.parameters(), lr=0.1), batch, None)
    assert norm > 1 and got == pytest.approx(loss.item())
    assert_close([*model.parameters()], new, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def by_hand(student, teacher, optimizer, batch, generator, **settings):
    """What `sdft_step` should be."""
    # An answer has two results and an end token: one more would be too long.
    contexts = batch["prompts"], batch["teacher_prompts"], 4, toy.EOS
    return train_step(student, teacher, optimizer, *contexts, generator=generator, **settings)[0]


def test_sdft_step_is_train_step_with_every_setting():
    """The student reads the prompts, the teacher the prompts with demonstrations."""
    batch, results = {k: rows[:8] for k, rows in toy.skill("X", "train").items()}, []
    for step in (train_toy.sdft_step, by_hand):
        student, teacher = toy_gpt(), toy_gpt()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        settings = {"divergence": "jsd", "alpha": 0.3, "temperature": 0.5}
        loss = step(student, teacher, optimizer, batch, seeded(1), **settings)
        results.append([loss, student.state_dict(), teacher.state_dict()])
    assert_close(*results, rtol=0, atol=0)


def fine_tuned(seed, steps=14):
    """Per step of `fine_tune`: the minibatch as text, a random number, the learning rate."""
    seen = []

    def step(student, teacher, optimizer, batch, generator, setting):
        group = optimizer.param_groups[0]
        seen.append((texts(batch), torch.rand(1, generator=generator).item(), group["lr"]))
        assert setting == "passed on" and group["weight_decay"] == 0
        return len(seen)

    data = {key: rows[:50] for key, rows in toy.skill("X", "train").items()}
    end, student = lambda loss, teacher: loss == steps - 1, toy_gpt()
    teacher = train_toy.fine_tune(
        student, data, step, 0.5, steps, 20, seed, end, setting="passed on"
    )
    assert_close(teacher.state_dict(), student.state_dict(), rtol=0, atol=0)
    assert len(seen) == steps - 1 and not any(p.requires_grad for p in teacher.parameters())
    return seen


def test_fine_tuning_warms_up_and_follows_a_cosine():
    """lr min(1, (i + 1) / 10) (1 + cos(π i / steps)) / 2 at step i."""
    expected = [min(1, (i + 1) / 10) * (1 + math.cos(math.pi * i / 14)) / 4 for i in range(13)]
    assert [lr for *_, lr in fine_tuned(0)] == pytest.approx(expected)


def test_minibatches_and_rollouts_depend_on_seed():
    """And on the step; no minibatch has a row twice, and its columns belong together."""
    runs = [fine_tuned(seed) for seed in (0, 1, 0)]
    drawn = runs[0] + runs[1]
    assert runs[0] == runs[2] and len({u for _, u, _ in drawn}) == len(drawn)
    assert len({tuple(sorted(rows)) for rows, *_ in drawn}) == len(drawn)
    for rows, *_ in drawn:
        assert len(set(rows)) == 20 and all(t == f"{x[:-1]}!{d}=" for x, t, d, _ in rows)


def test_base_depends_on_seed():
    """Its weights at the start, and the lines that it is trained on; the warm-up takes 50 steps."""
    lines = mock.Mock(return_value=([toy.encode("?X123=")], np.array([toy.encode("12.")])))
    bases = [
        train_toy.pretrain(lines, seed, 1, torch.device("cpu"), n_embd=16) for seed in (0, 0, 1)
    ]
    torch.manual_seed(0)
    start = GPT(GPTConfig(**train_toy.MODEL | {"n_embd": 16})).wte.weight
    a, b, c = (base.wte.weight for base in bases)
    assert torch.equal(a, b) and (a - c).std() > 0.02
    assert (a - start).abs().max().item() == pytest.approx(2e-3 / 50, rel=0.05)  # Adam's first step
    a, b, c = (arguments[0].random() for arguments, _ in lines.call_args_list)
    assert a == b != c


def test_evaluate_gives_accuracy_and_mean_length(monkeypatch):
    """Lengths in tokens, the end token included."""
    y = torch.tensor([toy.encode(said) for said in ("31...", "3....", "31...", "31313")])
    mask = torch.arange(5) < torch.tensor([[3], [2], [3], [5]])
    monkeypatch.setattr(train_toy, "rollout", lambda *_: (y, mask))
    data = {"prompts": np.zeros((4, 1)), "answers": np.array([toy.encode("31.")] * 4)}
    assert train_toy.evaluate(toy_gpt(), {"X": data}) == ({"X": 0.5}, {"X": 13 / 4})


FLAGS = {"seed": 7, "pretrain_steps": 2, "batch_size": 9, "ema_alpha": 0.5, "divergence": "jsd"}
FLAGS |= {"lr": 3e-3, "steps": 2, "sft_lr": 2e-3, "sft_steps": 3, "sft_style": "own"}
SMALL = {"n_layer": 1, "n_embd": 16}
RIGHT = {("test", 0): "XAB", ("test", 1): "YA", ("val", 0): "ZABC", ("shown", 0): "YZ"}


def answers_of_seed_7():
    """{question, as "?X425": (its split, its answer)}"""
    rows = [(s, row) for k in toy.KNOWN for s in SPLITS for row in texts(toy.skill(k, s, seed=7))]
    return {x[:-1]: (split, answer) for split, (x, _, _, answer) in rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """train_toy.main with known answers: the base ends at the gate, then --base takes it again."""
    truth, bases, out = answers_of_seed_7(), [], tmp_path_factory.mktemp("run")

    def known_answers(model, prompts, max_new_tokens, eos_id, temperature=1.0, generator=None):
        """Right in the skills of RIGHT only, and in X only if the model is not the base."""
        bases.append(model.wte.weight.clone())
        ys = []
        for prompt in map(toy.decode, prompts):
            question, _, shown = prompt[:-1].partition("!")
            (split, answer), name = truth[question], prompt[1]
            right = name in RIGHT.get(("shown" if shown else split, temperature), "")
            right &= name != "X" or not torch.equal(bases[0], bases[-1])
            ys.append(toy.encode(answer if right else "." * len(answer)))
        return torch.tensor(ys), torch.tensor(ys) >= 0

    flags = [f"--{name}={value}" for name, value in (FLAGS | {"out_dir": out}).items()]
    (out / "results.json").write_text("of an earlier run")
    printed = open(out / "printed.txt", "w")
    with pytest.MonkeyPatch.context() as patch, printed, contextlib.redirect_stdout(printed):
        patch.setattr(train_toy, "rollout", known_answers)
        patch.setattr(train_toy, "MODEL", train_toy.MODEL | SMALL)
        with pytest.raises(ValueError, match="0.67, below 0.9.*raise --pretrain_steps"):
            train_toy.main(flags)
        assert not (out / "results.json").exists()
        patch.setattr(train_toy, "TEACHER_GATE", 0.6)
        patch.setattr(train_toy, "pretrain", None)
        train_toy.main([*flags, f"--base={out / 'base.pt'}"])
    return out


def test_every_flag_reaches_what_it_names(run):
    """By direct calls: both arms start from the base and learn skill after skill."""
    base = train_toy.pretrain(toy.rivals_batch, 7, 2, torch.device("cpu"), **SMALL)
    sft, sdft = copy.deepcopy(base), copy.deepcopy(base)
    for skill in "XYZ":
        own, expert = (toy.skill(skill, "train", 7, style) for style in ("own", "expert"))
        train_toy.fine_tune(sft, own, train_toy.sft_step, 2e-3, 3, 9, 7)
        train_toy.fine_tune(sdft, expert, by_hand, 3e-3, 2, 9, 7, divergence="jsd", alpha=0.5)
    for name, model in {"base": base, "sft": sft, "sdft": sdft}.items():
        assert_close(torch.load(run / f"{name}.pt"), model.state_dict(), rtol=0, atol=0)


def test_tables_measure_test_and_logs_validation_inputs(run):
    """The students' prompts, without demonstrations; "prior" is the mean over prior skills."""
    results, n = json.loads((run / "results.json").read_text()), len(toy.PRIOR)
    row = {"X": 1, "Y": 0, "Z": 0, "prior": 2 / n}
    row |= {"X_sampled": 0, "Y_sampled": 1, "Z_sampled": 0, "prior_sampled": 1 / n}
    assert results["base"] == row | {"X": 0, "teacher": pytest.approx(2 / 3)}
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for arm in ("sft", "sdft"):
        assert results[arm] == [{"after": skill} | row for skill in "XYZ"]
        for skill, accuracy in ("X", 0), ("Y", 0), ("Z", 1):
            lines = [line for line in log if (line["phase"], line["skill"]) == (arm, skill)]
            assert lines and all(m["new"] == accuracy and m["prior"] == 3 / n for m in lines)


def test_table_and_command_of_the_page_are_printed(run):
    """The accuracies after X; the closing line makes the page of this very run."""
    printed = (run / "printed.txt").read_text()
    row = [f"{accuracy:.2f}" for accuracy in (1, 0, 0, 2 / len(toy.PRIOR))]
    assert ["X", *row, *row] in [line.split() for line in printed.splitlines()]
    command = shlex.split(printed.splitlines()[-1].partition(": ")[2])
    assert command[:3] == ["python", "-m", "experiments.page"]
    page.main(command[3:])
    assert "--sft_style=own" in (run / "page.html").read_text()  # the run's own command


def test_samples_show_the_same_prompts_through_training(run):
    """Before, during and after every skill: three of it, three prior ones, none trained on."""
    rows, truth, skills = samples.read(run / "samples.jsonl")[0], answers_of_seed_7(), {}
    for row in rows:
        new = row["prompt"][1] == row["skill"]
        split, right = truth[row["prompt"][:-1]]
        assert split == "val" and row["expected"] == right and new == (row["kind"] == "new")
        assert row["teacher_prompt"] == f"{row['prompt'][:-1]}!{row['demonstration']}="
        said = "".join(token["text"] for token in row["tokens"])
        assert row["response"] == said and row["correct"] == (said == right)
        if row["role"] == "student":
            track = skills.setdefault((row["phase"], row["skill"]), {})
            track.setdefault(row["step"], []).append(row["prompt"])
    assert [*skills] == [(arm, skill) for arm in ("sft", "sdft") for skill in "XYZ"]
    for (arm, _), track in skills.items():
        assert [*track] == [*range(FLAGS["steps" if arm == "sdft" else "sft_steps"] + 1)]
        assert all(prompts == track[0] and len({*prompts}) == 6 for prompts in track.values())
    teacher = [row for row in rows if row["role"] == "teacher"]
    assert [row["step"] for row in teacher] == [0] * 36  # both arms, three skills


def test_log_tells_teacher_and_student_apart(run):
    """The teacher's greedy answers to Y and Z are right, no sampled one is; SFT has no teacher."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in [row for row in log if row["skill"]]:
        assert row["rollouts_correct"] == row["never_ended"] == 0
        found = row.get("teacher_accuracy")
        assert found == (None if row["phase"] == "sft" else float(row["skill"] in "YZ"))
        told = " ".join(row["warnings"])
        first = (row["phase"], row["skill"], row["step"]) == ("sdft", "X", 0)
        assert ("the teacher answers 0% right" in told) == first
    assert "warning: the teacher answers 0%" in (run / "printed.txt").read_text()


def test_damaged_base_is_refused(run, tmp_path, monkeypatch):
    """An empty or a cut file, and one wrong byte, which torch.load does not see."""
    monkeypatch.setattr(train_toy, "MODEL", train_toy.MODEL | SMALL)
    good, path = (run / "base.pt").read_bytes(), tmp_path / "base.pt"
    at = good.index(
        train_toy.load_base(run / "base.pt", "cpu").wpe.weight.detach().numpy().tobytes()
    )
    for bad in (b"", good[:-700], good[:at] + b"?" + good[at + 1 :]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="leave it out to pretrain"):
            train_toy.load_base(path, "cpu")


ENDINGS = [
    ("--divergence=backward", "reverse"),
    ("--ema_alpha=2", "--ema_alpha must lie between 0 and 1"),
    ("--lr=nan", "--lr must"),
    ("--batch_size=401", "--batch_size must"),
    ("--base=LICENSE", "error: --base LICENSE is missing or no base"),
    ("--out_dir=LICENSE/x", "error: LICENSE/x: Not a directory; choose another --out_dir"),
    (FloatingPointError("lower the rate"), "error: lower the rate"),
    (RuntimeError("no kernel\nat line 3"), "error: no kernel; if --device is not cpu, try that"),
    (KeyboardInterrupt(), "interrupted"),
]


@pytest.mark.parametrize("cause, words", ENDINGS)
def test_every_error_ends_in_one_sentence(cause, words, tmp_path, monkeypatch, capsys):
    """A wrong flag or a failing run: what, where, remedy, and no traceback."""
    flag = cause if isinstance(cause, str) else "--seed=1"
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", ["train_toy.py", f"--out_dir={tmp_path}", flag])
    monkeypatch.setattr(toy, "rivals_batch", mock.Mock(side_effect=cause))
    with pytest.raises(SystemExit) as end:
        runpy.run_path("train_toy.py", run_name="__main__")
    assert words in f"{end.value.code} {capsys.readouterr().err}"
