"""What the experiments guarantee: they run, score what they name, resume, and fill the README.

A lookup table in a model's place, correct on prompts that a test chooses, has known scores.
"""

import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_toy
from data import scoring, toy
from experiments import all as all_of_them
from experiments import (
    common,
    context,
    kl,
    knowledge,
    on_policy,
    pareto,
    pass_at_k,
    real_model,
    reasoning,
    report,
    runner,
    scaling,
    sequential,
    settings,
    teacher,
    teacher_weights,
)
from model import GPT, GPTConfig
from sdft import completion_logits, sdft_loss

HERE = Path(__file__).parent
EQUALS = toy.VOCAB.index("=")  # the last token of every prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all, so that the miniature bases are made once."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(autouse=True)
def restore_the_process():
    threads, before = torch.get_num_threads(), dict(vars(common.options))
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    vars(common.options).clear()
    vars(common.options).update(before)


@pytest.fixture
def quick():
    common.options.quick = True


def flags(folder, *more):
    return ["--quick", "--jobs", "1", "--out_dir", str(folder), *more]


def result_of(folder, name):
    result = json.loads((folder / f"{name}.json").read_text())
    return {key: value for key, value in result.items() if key != "seconds"}


def one_of_a_kind(arms):
    """One point of a grid, and one arm of those that share the step and the settings' names."""
    kinds = {}
    for name, arm in arms.items():
        steps = [(settings or {}).get("step") for settings in (arm, arm.get("settings"))]
        kind = name.split(", ")[0] if " at " in name else str([[*arm], steps])
        kinds.setdefault(kind, name)
    return {name: arms[name] for name in kinds.values()}


@pytest.mark.parametrize("name", all_of_them.NAMES)
def test_every_experiment_runs_and_writes_its_results(name, folder, monkeypatch, capsys):
    """A crash in any arm, a metric that is not finite, a column that no arm has."""
    module = importlib.import_module(f"experiments.{name}")
    monkeypatch.setattr(module, "ARMS", one_of_a_kind(module.ARMS))
    monkeypatch.setattr(toy, "PRIOR", {"A": toy.PRIOR["A"]})  # for speed
    runner.main(name, flags(folder))
    result = json.loads((folder / f"{name}.json").read_text())
    assert set(result) == {"experiment", "seeds", "rows", "seconds"}
    assert (result["experiment"], result["seeds"]) == (name, [0])
    assert [row["arm"] for row in result["rows"]] == [*module.ARMS]
    for row in result["rows"]:
        assert set(row) == {"arm", "metrics"} and row["metrics"]
        values = row["metrics"].values()
        assert all(len(v) == 1 and isinstance(v[0], float) and np.isfinite(v[0]) for v in values)
    printed = capsys.readouterr().out
    for column in module.COLUMNS:
        assert any(column in row["metrics"] for row in result["rows"]) and column in printed


@pytest.mark.parametrize("name", report.NAMES)
def test_every_docstring_has_claim_and_command(name):
    """--help prints it: the paper's finding, a command that works, no prediction."""
    doc = importlib.import_module(f"experiments.{name}").__doc__
    assert "paper" in doc and f"python -m experiments.{name} --seeds " in doc
    assert "expect " not in doc.lower()


# --- Scores --------------------------------------------------------------------------------------


class LookUp(torch.nn.Module):
    """Gives the known answers with probability p and ends at once at any other prompt."""

    def __init__(self, *data, key="prompts", p=1.0):
        super().__init__()
        self.wte = torch.nn.Embedding(1, 1)  # only to have parameters and a device
        self.known, self.p = {}, p
        for d in data:
            self.known |= dict(zip(map(tuple, d[key].tolist()), d["answers"].tolist()))

    def kv_cache(self, batch_size, max_len):
        return {"tokens": torch.empty(batch_size, 0, dtype=torch.long)}

    def hidden(self, tokens, n_pad=None, cache=None):
        assert n_pad is None  # the toy's prompts in one set are equally long
        columns = range(1, tokens.size(1) + 1)
        if cache is not None:
            tokens = cache["tokens"] = torch.cat([cache["tokens"], tokens], 1)
            columns = [tokens.size(1)]  # a rollout needs the last one only
        rows = [[self.logits(row[:t]) for t in columns] for row in tokens.tolist()]
        return torch.tensor(rows)  # (B, T, V)

    def logits(self, prefix):
        logits = [-30.0] * len(toy.VOCAB)
        if EQUALS in prefix:
            end = prefix.index(EQUALS) + 1
            n, answer = len(prefix) - end, self.known.get(tuple(prefix[:end]), [])
            p = self.p if n == 0 else 1.0
            logits[toy.EOS] = math.log(1 - p + 1e-9)
            logits[answer[n] if n < len(answer) else toy.EOS] = math.log(p)
        return logits

    def lm_head(self, hidden):
        return hidden


def of_skill(name, split="test", style="expert"):
    return toy.skill(name, split, 0, style)


def taught(student, seed=0, settings=True, name="X"):
    """In place of `train_on_skill`: a copy that knows one more skill."""
    new = LookUp(of_skill(name))
    new.known |= student.known if settings else {}
    return new if settings else student


def test_skill_metrics_tell_sampled_from_greedy():
    """Sampled accuracies that are greedy, a prior mean over other skills, a length off by one."""
    model = LookUp(of_skill("X"), *(of_skill(k) for k in "AB"), p=0.6)
    metrics = common.skill_metrics(model, 0)
    assert metrics["new greedy"] == 1 and metrics["prior greedy"] == 2 / 8
    assert metrics["new"] == pytest.approx(0.6, abs=0.1)
    assert metrics["prior"] == pytest.approx(0.6 * 2 / 8, abs=0.04)
    assert metrics["length"] == pytest.approx(1 + 2 * metrics["new"])
    assert common.skill_metrics(model, 0, "Y")["new greedy"] == 0


def test_settings_are_judged_by_validation_inputs(quick):
    """Test inputs must not choose the settings."""
    on_val, on_test = LookUp(of_skill("X", "val")), LookUp(of_skill("X", "test"))
    assert common.validation(on_val, 0) == {"val new": 1, "val prior": 0}
    assert common.validation(on_test, 0) == {"val new": 0, "val prior": 0}
    assert common.skill_metrics(on_val, 0)["new"] == 0


def test_matching_stops_on_validation_inputs(monkeypatch):
    """It stops at the first look that reaches the other's accuracy, and never by test inputs."""

    def learn(student, data, on_step, steps, split, **settings):
        for update in range(1, steps + 1):
            if update == 5:
                student.known |= LookUp(of_skill("X", split)).known
            if on_step(1.0):
                break

    other = LookUp(of_skill("X", "val"))
    for split, updates in [("val", 6), ("test", 8)]:
        arm = dict(style="expert", steps=8, split=split)
        monkeypatch.setattr(common, "fine_tune", learn)
        start = LookUp()
        assert common.train_to_match(other, start, 0, arm, every=3)[1] == updates
        assert not start.known  # a copy was trained


@pytest.mark.parametrize(
    "part, question, expected",
    [
        ("new", "A", {"strict": 1, "lenient": 1, "OOD": 0, "known": 0}),
        ("new", "B", {"strict": 0, "lenient": 0, "OOD": 1, "known": 0}),
        ("known", "A", {"strict": 0, "lenient": 0, "OOD": 0, "known": 0.5}),
        ("val", "A", {"strict": 0, "lenient": 0, "OOD": 0, "known": 0}),
    ],
)
def test_facts_are_scored_by_entities_and_questions(part, question, expected):
    """OOD that asks the trained question, or a score of the wrong entities."""
    metrics = knowledge.facts_metrics(LookUp(toy.facts(part, 0, question)), 0)
    assert {name: metrics[name] for name in expected} == expected


def test_lenient_needs_the_last_token_only():
    """Strict and lenient swapped, or both by the same rule."""
    data = toy.facts("new", 0)
    data["answers"][:, 0] += 1  # the first attribute is wrong
    metrics = knowledge.facts_metrics(LookUp(data), 0)
    assert (metrics["strict"], metrics["lenient"]) == (0, 1)


def test_facts_are_validated_on_other_entities(monkeypatch):
    """The second run learns and asks the validation entities, not those of the table."""

    def train(student, data, seed, **settings):
        is_val = np.array_equal(data["prompts"], toy.facts("val", 0)["prompts"])
        return LookUp(toy.facts("val" if is_val else "known", 0)), None

    monkeypatch.setattr(knowledge, "base", lambda *a: LookUp())
    monkeypatch.setattr(knowledge, "train", train)
    metrics = knowledge.measure(0, settings=settings.SDFT_FACTS)
    assert (metrics["strict"], metrics["val strict"]) == (0, 1)
    assert (metrics["known"], metrics["val known"]) == (0.5, 0)


def test_texts_are_read_where_they_belong(monkeypatch):
    """The oracle and the teacher read the text named; the base reads none."""
    base = LookUp(toy.facts("new", 0, reads="article"), key="teacher_prompts")
    for module in (knowledge, context):
        monkeypatch.setattr(module, "base", lambda *a: base)
    assert knowledge.measure(0, read="article")["strict"] == 1
    assert knowledge.measure(0)["strict"] == 0
    for text in ("article", "answer", "both"):
        assert context.measure(0, text, None)["teacher"] == (text == "article")


@pytest.mark.parametrize("text", ["answer", "article", "both"])
def test_the_named_text_teaches_the_facts(text, monkeypatch):
    """In training the teacher reads the arm's text, not another."""
    seen = []
    monkeypatch.setattr(context, "base", lambda *a: LookUp())
    monkeypatch.setattr(knowledge, "train", lambda s, data, *a, **kw: seen.append(data) or (s, s))
    context.measure(0, text, settings.SDFT_FACTS)
    prompts = toy.facts("new", 0, reads=text)["teacher_prompts"]
    assert np.array_equal(seen[0]["teacher_prompts"], prompts)


@pytest.mark.parametrize("arm, style", [(settings.SFT_OWN, "own"), (settings.SDFT, "expert")])
def test_training_gets_style_seed_and_settings(arm, style, monkeypatch):
    """Demonstrations in another style, minibatches and rollouts that ignore the seed."""
    seen = {}

    def fine_tune(student, data, step, lr, steps, **more):
        seen.update(data=data, got=dict(step=step, lr=lr, steps=steps, **more))

    monkeypatch.setattr(common, "fine_tune", fine_tune)
    start = LookUp()
    assert common.train_on_skill(start, 3, arm, "Y") is not start
    expected = toy.skill("Y", "train", 3, style)["demonstrations"]
    assert np.array_equal(seen["data"]["demonstrations"], expected)
    assert seen["got"] | {"style": style} == {"style": style, "seed": 3} | arm


def test_the_teacher_reads_the_demonstration(quick, monkeypatch):
    """Accuracy or KL of the teacher without its demonstration."""
    base = LookUp(of_skill("X"), key="teacher_prompts")
    monkeypatch.setattr(teacher, "base", lambda *a: base)
    without, reading = (teacher.measure(0, **teacher.ARMS[arm]) for arm in ("base", "teacher"))
    assert without == {"accuracy": 0, "KL": 0}
    assert reading["accuracy"] == 1 and reading["KL"] > 1


@pytest.mark.parametrize("style, length", [("own", 3), ("short", 2)])
def test_answers_without_reasoning_count_by_result(style, length, quick, monkeypatch):
    """The bare result is correct too, and shorter; the teacher reads it as its demonstration."""
    data = of_skill("X", style=style)
    data["answers"] = data["demonstrations"]
    teacher_data = of_skill("X", style="short")
    base = LookUp(data)
    base.known |= LookUp(teacher_data, key="teacher_prompts").known
    monkeypatch.setattr(reasoning, "base", lambda *a: base)
    metrics = reasoning.measure(0)
    assert (metrics["new"], metrics["length"]) == (1, length)
    assert reasoning.measure(0, read="teacher_prompts") == {"new": 1, "length": 3}


@pytest.mark.parametrize("arm", ["sdft", "sft stopped"])
def test_each_stage_starts_from_the_last(arm, quick, monkeypatch):
    """Stages that start from the base again would know Z only."""

    def match(other, student, seed, settings, name):
        so_far = "XYZ"[: "XYZ".index(name) + 1]
        assert other.known == LookUp(*(of_skill(k) for k in so_far)).known
        return taught(student, name=name), 7

    monkeypatch.setattr(sequential, "base", lambda *a: LookUp())
    monkeypatch.setattr(sequential, "train_on_skill", taught)
    monkeypatch.setattr(sequential, "train_to_match", match)
    metrics = sequential.measure(0, **sequential.ARMS[arm])
    for i, (stage, name) in itertools.product(range(3), enumerate("XYZ")):
        assert metrics[f"after {'XYZ'[i]}: {name}"] == (stage <= i)
    assert metrics["own"] == metrics["X"] == metrics["Z"] == 1 and metrics["prior"] == 0
    assert [metrics.get(f"updates {k}") for k in "XYZ"] == [7 if "stopped" in arm else None] * 3


def test_stopped_sft_matches_sdft_not_base(quick, monkeypatch):
    """The accuracy to reach is that of a trained SDFT."""
    monkeypatch.setattr(pareto, "base", lambda *a: LookUp())
    monkeypatch.setattr(pareto, "train_on_skill", taught)
    monkeypatch.setattr(pareto, "train_to_match", lambda other, *a: (other, 5))
    metrics = pareto.measure(0, **pareto.ARMS["sft stopped, 0.001"])
    assert (metrics["new"], metrics["updates"]) == (1, 5)


def test_the_gap_is_sdft_minus_sft(quick, monkeypatch):
    """The sign of the gap, and which accuracy stands under which name."""

    def only_sdft_learns(student, seed, settings):
        return sdft if settings is settings_of["sdft"] else student

    sdft = LookUp(of_skill("X"), of_skill("A"), of_skill("B"))
    settings_of = scaling.ARMS["width 16"]
    monkeypatch.setattr(scaling, "base", lambda *a: LookUp(of_skill("A")))
    monkeypatch.setattr(scaling, "train_on_skill", only_sdft_learns)
    metrics = scaling.measure(0, **settings_of)
    assert (metrics["sdft"], metrics["sft"], metrics["base"], metrics["gap"]) == (1, 0, 0, 1)
    assert metrics["prior gap"] == metrics["prior sft"] == metrics["prior base"] == 1 / 8


@pytest.mark.parametrize("collapsed", [True, False])
def test_collapsed_is_below_half_the_base(collapsed, quick, monkeypatch):
    """The inverted comparison, and a teacher measured without its demonstration."""
    student = LookUp() if collapsed else LookUp(of_skill("X"))
    trained = student, LookUp(of_skill("X"), key="teacher_prompts")
    monkeypatch.setattr(teacher_weights, "base", lambda *a: LookUp(of_skill("X")))
    monkeypatch.setattr(teacher_weights, "train", lambda *a, **kw: trained)
    metrics = teacher_weights.measure(0, **settings.SDFT)
    assert (metrics["collapsed"], metrics["teacher"]) == (collapsed, 1)


@pytest.mark.parametrize("arm", ["offline, reverse KL", "sft, offline", "sft"])
def test_offline_responses_are_the_teachers(arm, quick, monkeypatch):
    """Responses drawn without the demonstration; offline SFT that imitates the expert."""
    seen = {}

    def train(student, data, seed, **settings):
        seen.update(data)
        return student, None

    base = LookUp(of_skill("X", "train"), key="teacher_prompts")
    monkeypatch.setattr(on_policy, "base", lambda *a: base)
    monkeypatch.setattr(on_policy, "train", train)
    on_policy.measure(0, **on_policy.ARMS[arm])
    assert np.array_equal(seen["samples"], seen["answers"]) and seen["samples_mask"].all()
    is_offline_sft = np.array_equal(seen["demonstrations"], seen["samples"])
    assert is_offline_sft == (arm == "sft, offline")


# --- Estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n, c, k", [(6, 0, 2), (6, 1, 1), (6, 2, 3), (5, 4, 2), (6, 6, 6)])
def test_pass_at_k_is_the_share_of_subsets(n, c, k):
    """The share of the subsets of k responses that hold a correct one, by enumeration."""
    correct = [True] * c + [False] * (n - c)
    subsets = [any(subset) for subset in itertools.combinations(correct, k)]
    assert pass_at_k.pass_at_k(n, c, k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_draws_all_samples_anew(quick, monkeypatch):
    """1 - (1 - p)^k: the same 16 responses eight times would give .28 in place of .73."""
    monkeypatch.setattr(pass_at_k, "base", lambda *a: LookUp(of_skill("X"), p=0.02))
    metrics = pass_at_k.measure(0, None)
    assert metrics["pass@64"] == pytest.approx(1 - 0.98**64, abs=0.15)
    assert metrics["pass@1"] == pytest.approx(0.02, abs=0.01)


def tiny(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def test_kl_to_base_is_of_whole_responses(monkeypatch):
    """Σ_y p(y) log(p(y)/q(y)) over every response of at most two tokens."""
    monkeypatch.setattr(common, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(toy, "EOS", 0)
    base, model, prompt, model_prompt = tiny(0), tiny(1), [1, 2], [1, 2, 3]

    def log_probability(model, prompt, y):
        log_p = completion_logits(model, [prompt], torch.tensor([y]))[0].log_softmax(-1)
        return sum(log_p[t, token].item() for t, token in enumerate(y))

    exact = 0.0
    for y in [(0,), *((a, b) for a in (1, 2, 3) for b in range(4))]:
        log_p, log_q = log_probability(model, model_prompt, y), log_probability(base, prompt, y)
        exact += np.exp(log_p) * (log_p - log_q)
    prompts, model_prompts = ([p] * 2000 for p in (prompt, model_prompt))
    sampled = common.kl_to_base(base, model, prompts, model_prompts)
    assert exact > 0.1 and sampled == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("arm", ["reverse", "forward", "jsd"])
def test_noise_is_of_the_arms_divergence(arm, quick, monkeypatch):
    """Each arm's noise is that of the gradient by which it was trained."""
    used, distill_loss = [], kl.distill_loss

    def noted(*inputs):
        used.append(inputs[6])
        return distill_loss(*inputs)

    monkeypatch.setattr(kl, "base", lambda seed: GPT(GPTConfig(**train_toy.MODEL | {"n_embd": 16})))
    monkeypatch.setattr(kl, "distill_loss", noted)
    kl.measure(0, **kl.ARMS[arm])
    assert used == [arm] * 4  # draws, with --quick


def test_gradient_noise_is_unbiased_with_few_draws():
    """E[variance] = sd² and E[|mean|²] - sd²/n = 1 per weight, with n = 2 draws, too."""
    n, sd = 20000, 0.5
    model = torch.nn.Linear(n, 1, bias=False)

    def loss(generator):
        return (model.weight * (1 + sd * torch.randn(1, n, generator=generator))).sum()

    assert kl.gradient_noise(model, loss, draws=2) == pytest.approx(sd**2, rel=0.05)


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


def test_sampled_token_has_the_kls_gradient(monkeypatch):
    """Its expectation over the sampled token is the gradient of the sum over the vocabulary."""
    student, teacher_model = tiny(0), tiny(1)
    batch = {"prompts": [[1, 2]], "teacher_prompts": [[1, 2, 3]]}
    logits, teacher_logits = (
        completion_logits(model, batch[key], torch.tensor([[0]]))
        for model, key in ((student, "prompts"), (teacher_model, "teacher_prompts"))
    )
    average = 0
    for token, p in enumerate(logits.softmax(-1)[0, 0].tolist()):
        drawn = torch.tensor([[token, 3]]), torch.tensor([[True, False]])  # 3 is padding
        monkeypatch.setattr(kl, "rollout", lambda *a, **kw: drawn)
        loss = kl.sampled_token_loss(student, teacher_model, batch, None)
        average = average + p * gradient(loss, student)
    exact = gradient(sdft_loss(logits, teacher_logits, torch.ones(1, 1))[0], student)
    torch.testing.assert_close(average, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_the_offline_step_scores_given_responses(divergence):
    """Its loss is `sdft_loss` on the samples; student and teacher move as in any step."""
    student, teacher_model = tiny(0), tiny(1)
    start = [p.clone() for p in teacher_model.parameters()]
    samples, mask = torch.tensor([[1, 0], [3, 2]]), torch.tensor([[True, False], [True, True]])
    batch = {"prompts": [[1, 2]] * 2, "teacher_prompts": [[1, 2, 3]] * 2}
    logits = [
        completion_logits(model, batch[key], samples)
        for model, key in ((student, "prompts"), (teacher_model, "teacher_prompts"))
    ]
    expected = sdft_loss(*logits, mask, divergence)[0].item()
    batch |= {"samples": samples.numpy(), "samples_mask": mask.numpy()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    before = [p.clone() for p in student.parameters()]
    loss = on_policy.offline_step(
        student, teacher_model, optimizer, batch, None, divergence=divergence, alpha=0.25
    )
    assert loss == pytest.approx(expected)
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters()))
    for t, old, s in zip(teacher_model.parameters(), start, student.parameters()):
        torch.testing.assert_close(t, 0.75 * old + 0.25 * s)


# --- The runner ----------------------------------------------------------------------------------


@pytest.fixture
def without_arms(monkeypatch):
    """Arms that take no time; the list of those that ran."""
    ran = []

    def run_arm(name, seed, arm):
        ran.append((seed, arm))
        return dict(arm=arm, seed=seed, metrics={"accuracy": 1.0}, seconds=1)

    monkeypatch.setattr(runner, "run_arm", run_arm)
    monkeypatch.setattr(runner, "make_bases", lambda *a: None)
    return ran


def test_all_runs_every_experiment_in_turn(tmp_path, without_arms, monkeypatch, capsys):
    """One command for everything, with its bases made first."""
    monkeypatch.setattr(all_of_them, "NAMES", ["teacher", "context"])
    all_of_them.main(flags(tmp_path))
    assert (tmp_path / "teacher.json").exists() and (tmp_path / "context.json").exists()
    assert [arm for _, arm in without_arms] == [*teacher.ARMS, *context.ARMS]
    printed = capsys.readouterr().out
    assert "bases: 2 for each of 1 seeds" in printed and "[2/2," in printed


def test_resuming_equals_running_through(tmp_path, monkeypatch):
    """An interruption loses the arm in flight and a line cut short, and nothing else."""
    n, calls = len(teacher.ARMS), []

    def measure(seed, **settings):
        calls.append(settings)
        if len(calls) == n + 4:
            raise KeyboardInterrupt
        return {"accuracy": len(str(settings)), "KL": 0.1}

    monkeypatch.setattr(teacher, "measure", measure)
    monkeypatch.setattr(runner, "make_bases", lambda *a: None)
    runner.main("teacher", flags(tmp_path / "through"))
    with pytest.raises(SystemExit, match="the same command goes on"):
        runner.main("teacher", flags(tmp_path))
    assert not (tmp_path / "teacher.json").exists()
    log = tmp_path / "teacher.jsonl"
    log.write_text(log.read_text()[:-20])
    runner.main("teacher", flags(tmp_path))
    assert calls[n + 4 :] == [*teacher.ARMS.values()][2:]
    assert result_of(tmp_path, "teacher") == result_of(tmp_path / "through", "teacher")
    runner.main("teacher", flags(tmp_path))
    assert len(calls) == n + 4 + n - 2  # no finished arm runs again


def test_changed_code_runs_arms_again(tmp_path, without_arms, monkeypatch):
    """Results of other code must not be taken for these; more seeds run the new ones only."""
    arms = [*teacher.ARMS]
    runner.main("teacher", flags(tmp_path))
    runner.main("teacher", flags(tmp_path, "--seeds", "2"))
    assert without_arms == [(0, arm) for arm in arms] + [(1, arm) for arm in arms]
    numbers = runner.fingerprint(teacher, True) | {"sdft": 1}
    monkeypatch.setattr(runner, "fingerprint", lambda *a: numbers)
    without_arms.clear()
    runner.main("teacher", flags(tmp_path))
    assert without_arms == [(0, "sdft")]


@pytest.mark.parametrize("quick", [True, False])
def test_costly_arms_run_once_and_last(quick, tmp_path, without_arms, monkeypatch):
    """ONCE: on seed 0 alone, after all others, and not with --quick."""
    monkeypatch.setattr(teacher, "ARMS", {"teacher": dict(read="teacher_prompts"), "base": {}})
    monkeypatch.setattr(teacher, "ONCE", ["teacher"], raising=False)
    more = ["--quick"] if quick else []
    runner.main("teacher", ["--jobs", "1", "--out_dir", str(tmp_path), "--seeds", "2", *more])
    assert without_arms == [(0, "base"), (1, "base")] + [(0, "teacher")] * (not quick)


@pytest.mark.parametrize(
    "module, part",
    [(teacher, runner.train_toy), (teacher, runner.toy), (teacher, runner.sdft)]
    + [(teacher, runner.model), (teacher, common), (teacher, teacher)]
    + [(context, knowledge), (real_model, scoring)],
)
def test_the_fingerprint_covers_all_code(module, part, monkeypatch):
    """Every file behind an arm's numbers counts; comments do not."""
    source, before = runner.inspect.getsource, runner.fingerprint(module, quick=True)
    for text, same in [("\n# a comment", True), ("\nnew = 1", False)]:
        monkeypatch.setattr(runner.inspect, "getsource", lambda p: source(p) + text * (p is part))
        now = runner.fingerprint(module, quick=True)
        assert all((before[arm] == now[arm]) == same for arm in before)


def test_the_fingerprint_covers_settings(monkeypatch):
    """An arm's settings count for that arm alone, --quick and the inputs for all."""
    before = runner.fingerprint(teacher, quick=True)
    for other in (runner.fingerprint(teacher, False), runner.fingerprint(teacher, True, "data")):
        assert all(before[arm] != other[arm] for arm in before)
    changed = {"lr": dict(settings.SDFT, lr=0.5), "step": settings.SFT}
    for new in changed.values():
        monkeypatch.setitem(teacher.ARMS, "sdft", dict(settings=new))
        now = runner.fingerprint(teacher, quick=True)
        assert {arm for arm in before if before[arm] != now[arm]} == {"sdft"}


def test_parallel_processes_give_the_same_results(folder):
    """Two processes' numbers are one's: each has the options, and one thread."""

    def metrics(jobs):
        args = runner.parse_args("", flags(folder, "--jobs", jobs))
        runner.make_bases([0], teacher.WORLDS, args)
        tasks = [("teacher", 0, arm) for arm in ("base", "teacher")]
        return {r["arm"]: r["metrics"] for r in runner.in_processes(runner.run_arm, tasks, args)}

    one, two = metrics("1"), metrics("2")
    assert one == two and set(two) == {"base", "teacher"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_process_behind(number, folder, monkeypatch):
    """Workers end with their parent, and a sentence tells how to go on."""
    started = []
    if number == signal.SIGINT:  # a shell's background jobs ignore it
        signal.signal(number, signal.default_int_handler)

    def interrupted(futures):
        started.extend(multiprocessing.active_children())
        os.kill(os.getpid(), number)
        time.sleep(5)  # the signal ends it before

    monkeypatch.setattr(runner, "as_completed", interrupted)
    with pytest.raises(SystemExit, match="the same command goes on"):
        runner.main("kl", flags(folder, "--jobs", "2", "--seeds", "2"))
    assert len(started) == 2
    for process in started:
        process.join(timeout=10)
        assert not process.is_alive()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--seeds", "0"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--out_dir", "F/x"], "--out_dir"),
    ],
)
def test_a_wrong_command_line_is_named(more, words, tmp_path, monkeypatch, capsys):
    """One sentence with the flag, no traceback."""
    monkeypatch.chdir(tmp_path)
    Path("F").touch()  # a file, so that F/x cannot be a folder
    with pytest.raises(SystemExit) as stop:
        runner.main("teacher", more)
    assert words in str(stop.value) + capsys.readouterr().err


# --- Bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["{}", "5", "null", "[" * 10**5, "1" * 5000, '"\\ud800"', "NaN"]
    + ['{"arm": "base", "seed": 0, "code": CODE}', '{"arm": "base", "seed": [], "code": CODE}']
    + ['{"arm": [], "seed": 0, "code": CODE, "seconds": 1, "metrics": {"accuracy": 1}}']
    + [
        '{"arm": "base", "seed": 0, "code": CODE, "seconds": 1, "metrics": %s}' % metrics
        for metrics in ("{}", "5", '{"accuracy": "1"}', '{"accuracy": null}', '{"accuracy": NaN}')
    ],
)
def test_a_damaged_log_line_runs_its_arm_again(line, tmp_path, without_arms):
    """Of whatever kind; finished arms beside it are kept."""
    code = runner.fingerprint(teacher, True)
    line = line.replace("CODE", str(code["base"]))
    (tmp_path / "teacher.jsonl").write_bytes(b"\xff\x00" + line.encode() + b"\n" + line.encode())
    runner.main("teacher", flags(tmp_path))
    assert without_arms == [(0, arm) for arm in teacher.ARMS]
    runner.main("teacher", flags(tmp_path))
    assert without_arms == [(0, arm) for arm in teacher.ARMS]


def wait_for_ever(name):
    Path(name).write_text(str(os.getpid()))
    time.sleep(200)


def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    """kill -9 cannot be caught, and a worker that is left holds memory and a core."""
    parent = multiprocessing.get_context("spawn").Process(target=start_two, args=[tmp_path])
    parent.start()
    names = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 120
    while not all(name.exists() and name.read_text() for name in names):
        assert time.monotonic() < deadline and parent.is_alive()
        time.sleep(0.1)
    parent.kill()
    for name in names:
        while Path(f"/proc/{name.read_text()}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)


def start_two(folder):
    args = runner.parse_args("", flags(folder, "--jobs", "2"))
    for _ in runner.in_processes(wait_for_ever, [(str(folder / name),) for name in "01"], args):
        pass


def test_a_base_is_reused_from_its_file(quick, tmp_path, capsys):
    """Made once per seed and world; other settings or code make it again; damage is named."""
    common.options.out_dir = tmp_path
    first, again = common.base(0, n_embd=16), common.base(0, n_embd=16)
    assert capsys.readouterr().out.count("pretraining a base") == 1
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    [path] = (tmp_path / "bases").iterdir()
    assert common.load_base(path, common.base_config(0, 21, "skills", 16)) is None
    good = path.read_bytes()
    at = good.index(first.wte.weight.detach().numpy().tobytes())
    for bad in (good[:1000], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]):  # or a bit flips
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged or not a base; delete it"):
            common.base(0, n_embd=16)


@pytest.mark.parametrize("part", [toy, common.model_file, common.pretrain])
def test_a_bases_configuration_covers_its_origin(part, monkeypatch):
    """Seed, updates, world, width, and the code that made it."""
    before = common.base_config(0, 20, "skills", 16)
    for other in [(1, 20, "skills", 16), (0, 21, "skills", 16), (0, 20, "facts", 16)]:
        assert common.base_config(*other) != before
    assert common.base_config(0, 20, "skills", 32) != before
    source = common.inspect.getsource
    monkeypatch.setattr(
        common.inspect, "getsource", lambda p: source(p) + "\nnew = 1" * (p is part)
    )
    assert common.base_config(0, 20, "skills", 16) != before


# --- Settings and splits -------------------------------------------------------------------------


def test_parts_of_the_facts_are_disjoint():
    """Facts to learn, to choose settings by and to keep share no entity and cover all."""
    prompts = [
        {toy.decode(p) for question in "AB" for p in toy.facts(part, 3, question)["prompts"]}
        for part in toy.FACTS
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 200


def test_settings_are_chosen_by_validation_alone():
    """Of the arms within .02 of the best, the one that keeps most."""

    def row(arm, new, prior):
        metrics = {"val new": [new, new], "val prior": [prior, prior], "new": [0], "prior": [0]}
        return {"arm": arm, "metrics": metrics}

    rows = [row("base", 1, 1), row("a, 1 at 1", 0.9, 0.2), row("a, 2 at 1", 0.89, 0.7)]
    rows += [row("a, 3 at 1", 0.8, 0.9), row("b, 1 at 1", 0, 0)]
    best = settings.chosen(rows, "val new", "val prior")
    assert best == {"a": "a, 2 at 1", "b": "b, 1 at 1"}


@pytest.mark.parametrize(
    "sweep, family, constant",
    [
        ("pareto", "sft", settings.SFT),
        ("pareto", "sft own style", settings.SFT_OWN),
        ("pareto", "sdft", settings.SDFT),
        ("pareto", "sdft forward", settings.SDFT_FORWARD),
        ("knowledge", "sdft", settings.SDFT_FACTS),
    ],
)
def test_settings_are_what_the_sweeps_chose(sweep, family, constant):
    """The constants of settings.py against the committed results, and the family's settings."""
    rows = report.load(report.RESULTS)[sweep]["rows"]
    arm = settings.chosen(rows, *report.SWEEPS[sweep])[family]
    module = importlib.import_module(f"experiments.{sweep}")
    assert module.ARMS[arm]["settings"] == constant


# --- The report ----------------------------------------------------------------------------------


def test_the_readme_is_what_the_report_writes():
    """Text and committed results cannot drift apart."""
    text, results = report.README.read_text(encoding="utf-8"), report.load(report.RESULTS)
    assert set(results) == set(report.NAMES)
    for name, result in results.items():
        assert len(result["seeds"]) >= (3 if name == "real_model" else 5)
    assert report.rewritten(text, results) == text


def test_the_readme_links_to_existing_files():
    """Figures, results and files that the page names are there."""
    text = report.README.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (HERE / link).exists(), link
    for name in re.findall(r"python -m experiments\.(\w+)", text):
        assert (HERE / f"{name}.py").exists(), name


def test_the_report_changes_its_parts_alone():
    """A changed number changes its tables; the text around them stays."""
    text, results = report.README.read_text(encoding="utf-8"), report.load(report.RESULTS)
    results["teacher"]["rows"][0]["metrics"]["accuracy"] = [0.123] * 5
    changed = report.rewritten(text, results)
    assert "0.12 ± 0.00" in changed and changed != text
    outside = [re.sub(r"<!-- \w+ -->.*?<!-- end -->", "", t, flags=re.S) for t in (text, changed)]
    assert outside[0] == outside[1]


def test_no_claim_holds_if_nothing_differs():
    """A rule that is true of equal numbers would say yes to everything."""
    for claim, _, _, holds in report.claims(lambda *where: np.zeros(5)):
        assert not any(holds), claim


def claim(start, **values):
    """The claim that starts so, if chosen metrics have these values and all others are 0."""

    def at(name, arm, metric):
        return np.array(values.get(f"{arm}: {metric}", [0.0, 0.0, 0.0]))

    return next(c for c in report.claims(at) if c[0].startswith(start))


def test_only_matched_seeds_count_as_matched():
    """An SFT that never got there has not been compared at matched accuracy."""
    late, prior = [100, 400, 400], [0.9, 0.9, 0.1]
    values = {"sft stopped, 0.001: updates": late, "sft stopped, 0.0003: updates": [400] * 3}
    _, _, here, holds = claim("also if SFT stops", **values, **{"sdft: prior": prior})
    assert holds == [True] and "0.001 matched on 1 of 3" in here and "0.0003 matched on 0" in here
    values["sft stopped, 0.001: updates"] = [400] * 3
    holds = claim("also if SFT stops", **values, **{"sdft: prior": prior})[3]
    assert report.verdict(holds) == "cannot be tested here"


def test_kept_means_kept():
    """.85 of what a skill was after its own stage, not just more than SFT has left."""
    own = {f"sdft: after {k}: {k}": [1.0, 1.0, 0.9] for k in "XYZ"}
    end = {"sdft: X": [0.9, 0.8, 0.9], "sdft: Y": [0.9] * 3, "sdft: Z": [0.9, 0.9, 0.7]}
    _, _, here, holds = claim("SDFT keeps all", **own, **end, **{"base: X": [0.4, 0.4, 0.4]})
    assert holds.tolist() == [True, False, False]
    assert here.startswith(f"{np.mean([0.5 / 0.6, 0.4 / 0.6, 1.0]):.2f}")  # 0 = base, 1 = best


def test_committed_results_fit_the_code():
    """Every arm of the code is in the results, with a value per seed."""
    for name, result in report.load(report.RESULTS).items():
        module = importlib.import_module(f"experiments.{name}")
        assert [row["arm"] for row in result["rows"]] == [*module.ARMS]
        for row in result["rows"]:
            seeds = 1 if row["arm"] in getattr(module, "ONCE", ()) else len(result["seeds"])
            assert all_have_length(row["metrics"], seeds)


def all_have_length(metrics, n):
    return [len(values) for values in metrics.values()] == [n] * len(metrics)
