"""What the experiments guarantee: each runs and writes its contract, estimators are right, tables follow the results."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import toy
from experiments import all as all_of_them
from experiments import common, context, kl, knowledge, on_policy, report, runner, settings, teacher
from experiments.all import NAMES
from experiments.pass_at_k import pass_at_k
from model import GPT, GPTConfig
from sdft import completion_logits, sdft_loss

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all, so that the miniature bases are made once."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(autouse=True)
def threads_and_options():
    threads, before = torch.get_num_threads(), dict(vars(common.options))
    yield
    torch.set_num_threads(threads)
    vars(common.options).update(before)


def arguments(folder, *more):
    return ["--quick", "--jobs", "1", "--out_dir", str(folder), *more]


def result_of(folder, name):
    result = json.loads((folder / f"{name}.json").read_text())
    return {k: v for k, v in result.items() if k != "seconds"}


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_through_and_writes_its_contract(name, folder, monkeypatch, capsys):
    module = importlib.import_module(f"experiments.{name}")
    families = {arm.split(" at ")[0].split(",")[0] if " at " in arm else arm: arm for arm in module.ARMS}
    monkeypatch.setattr(module, "ARMS", {arm: module.ARMS[arm] for arm in families.values()})  # one point of a grid is enough
    runner.main(name, arguments(folder))
    result = json.loads((folder / f"{name}.json").read_text())
    assert set(result) == {"experiment", "seeds", "rows", "seconds"}
    assert (result["experiment"], result["seeds"]) == (name, [0])
    assert [row["arm"] for row in result["rows"]] == [*module.ARMS]
    for row in result["rows"]:
        assert set(row) == {"arm", "metrics"} and row["metrics"]
        assert all(len(v) == 1 and isinstance(v[0], float) and np.isfinite(v[0]) for v in row["metrics"].values())
    said = capsys.readouterr().out
    for column in module.COLUMNS:
        assert any(column in row["metrics"] for row in result["rows"]) and column in said


def test_every_experiment_opens_with_the_papers_claim_and_its_own_command():
    for name in NAMES:
        doc = importlib.import_module(f"experiments.{name}").__doc__
        assert "paper" in doc and f"python -m experiments.{name} --seeds 5" in doc


# --- The runner -----------------------------------------------------------------------------------------------------


def test_all_runs_one_experiment_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(all_of_them, "NAMES", ["teacher", "context"])
    all_of_them.main(arguments(tmp_path))
    assert (tmp_path / "teacher.json").exists() and (tmp_path / "context.json").exists()
    said = capsys.readouterr().out
    assert "bases: 2 for each of 1 seeds" in said and "[2/2," in said


def test_resuming_gives_the_same_json_as_running_through_and_runs_no_finished_arm_again(folder, tmp_path, monkeypatch):
    (tmp_path / "bases").symlink_to(folder / "bases")
    measure, calls = teacher.measure, []

    def counted(seed, **kw):
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(seed, **kw)

    runner.main("teacher", arguments(folder))
    monkeypatch.setattr(teacher, "measure", counted)
    with pytest.raises(SystemExit, match="the same command goes on"):
        runner.main("teacher", arguments(tmp_path))
    assert not (tmp_path / "teacher.json").exists()
    log = tmp_path / "teacher.jsonl"
    log.write_text(log.read_text()[:-20])  # as if the third arm's line had been cut short
    runner.main("teacher", arguments(tmp_path))
    assert len(calls) == 4 + len(teacher.ARMS) - 2
    assert result_of(tmp_path, "teacher") == result_of(folder, "teacher")
    runner.main("teacher", arguments(tmp_path))
    assert len(calls) == 4 + len(teacher.ARMS) - 2
    runner.main("teacher", arguments(tmp_path, "--seeds", "2"))
    assert calls[-len(teacher.ARMS) :] == [1] * len(teacher.ARMS)
    both, one = result_of(tmp_path, "teacher"), result_of(folder, "teacher")
    assert [{k: v[:1] for k, v in row["metrics"].items()} for row in both["rows"]] == [row["metrics"] for row in one["rows"]]


def test_an_arm_whose_settings_or_code_changed_runs_again(folder, monkeypatch):
    before = runner.fingerprint(teacher, quick=True)
    assert before == runner.fingerprint(teacher, quick=True) != runner.fingerprint(teacher, quick=False)
    monkeypatch.setitem(teacher.ARMS, "sdft", dict(settings=settings.SDFT | dict(lr=0.5)))
    changed = runner.fingerprint(teacher, quick=True)
    assert {arm for arm in before if before[arm] != changed[arm]} == {"sdft"}
    source = runner.inspect.getsource
    for module, part in [(teacher, runner.sdft), (teacher, runner.model), (teacher, common), (context, knowledge)]:
        before = runner.fingerprint(module, quick=True)
        with monkeypatch.context() as patched:
            patched.setattr(runner.inspect, "getsource", lambda p: source(p) + "\nnew = 1" * (p is part))
            assert all(before[arm] != now for arm, now in runner.fingerprint(module, quick=True).items())


def test_arms_that_cost_much_run_last_on_the_first_seed_alone_and_not_in_the_quick_setting(folder, monkeypatch):
    monkeypatch.setattr(teacher, "ARMS", {"teacher": dict(read="teacher_prompts"), "base": {}})
    monkeypatch.setattr(teacher, "ONCE", ["teacher"], raising=False)
    ran = []
    monkeypatch.setattr(runner, "run_arm", lambda name, seed, arm: ran.append((seed, arm)) or dict(arm=arm, seed=seed, metrics={"accuracy": 1.0}, seconds=1))
    monkeypatch.setattr(runner, "make_bases", lambda *a: None)
    for quick, expected in [(["--quick"], [(0, "base"), (1, "base")]), ([], [(0, "base"), (1, "base"), (0, "teacher")])]:
        runner.main("teacher", ["--jobs", "1", "--out_dir", str(folder / f"once{len(quick)}"), "--seeds", "2", *quick])
        assert ran == expected
        ran.clear()


def test_parallel_processes_give_the_same_json_as_one(folder, tmp_path):
    (tmp_path / "bases").symlink_to(folder / "bases")
    runner.main("context", arguments(folder))
    runner.main("context", arguments(tmp_path, "--jobs", "2"))
    assert result_of(tmp_path, "context") == result_of(folder, "context")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_process_behind_and_says_how_to_go_on(number, tmp_path):
    command = [sys.executable, "-m", "experiments.kl", "--seeds", "4", "--jobs", "2", "--out_dir", tmp_path]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "arms on 4 seeds" in process.stdout.readline()
    time.sleep(3)  # until the bases are being pretrained
    process.send_signal(number)
    assert "the same command goes on" in process.communicate()[1]
    with pytest.raises(ProcessLookupError):  # the group is empty
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize("flags, words", [(["--seeds", "0"], "--seeds"), (["--jobs", "0"], "--jobs"), (["--out_dir", "LICENSE/x"], "--out_dir")])
def test_a_wrong_command_line_is_named(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        runner.main("teacher", flags)
    assert words in str(stop.value) + capsys.readouterr().err


# --- Estimators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, c, k", [(6, 0, 2), (6, 1, 1), (6, 2, 3), (5, 4, 2), (6, 6, 6)])
def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_right_response(n, c, k):
    right = [True] * c + [False] * (n - c)
    subsets = [any(subset) for subset in itertools.combinations(right, k)]
    assert pass_at_k(n, c, k) == pytest.approx(np.mean(subsets))


def tiny(seed, scale):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=scale)
    return model


def test_kl_to_base_is_the_kl_between_the_distributions_of_whole_responses(monkeypatch):
    monkeypatch.setattr(common, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(toy, "EOS", 0)
    base, model, prompt, model_prompt = tiny(0, 0.5), tiny(1, 0.5), [1, 2], [1, 2, 3]
    exact = 0.0
    for y in [(0,), *((a, b) for a in (1, 2, 3) for b in range(4))]:  # every response of at most two tokens
        log_probability = lambda m, p: sum(
            completion_logits(m, [p], torch.tensor([y]))[0].log_softmax(-1)[t, token].item() for t, token in enumerate(y)
        )
        log_p, log_q = log_probability(model, model_prompt), log_probability(base, prompt)
        exact += np.exp(log_p) * (log_p - log_q)
    n = 20000
    sampled = common.kl_to_base(base, model, np.tile(prompt, (n, 1)), np.tile(model_prompt, (n, 1)))
    assert exact > 0.1 and sampled == pytest.approx(exact, rel=0.03)


def test_gradient_noise_is_the_variance_over_the_squared_mean():
    model = torch.nn.Linear(50, 1, bias=False)
    spread = 1.5
    loss = lambda student, teacher, batch, generator: (
        (student.weight * (1 + spread * torch.randn(1, 50, generator=generator))).sum(),
        1,
    )
    assert kl.gradient_noise(model, None, loss, draws=2000) == pytest.approx(spread**2, rel=0.05)


def test_the_sampled_token_loss_has_the_gradient_of_the_reverse_kl_on_average(monkeypatch):
    student, teacher = tiny(0, 0.5), tiny(1, 0.5)
    batch = {"prompts": [[1, 2]], "teacher_prompts": [[1, 2, 3]]}
    gradient = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*student.parameters()])])
    say = lambda token: lambda *a, **kw: (torch.tensor([[token]]), torch.tensor([[True]]))
    p = completion_logits(student, batch["prompts"], torch.tensor([[0]])).softmax(-1)[0, 0].tolist()
    average = 0
    for token in range(4):
        monkeypatch.setattr(kl, "rollout", say(token))
        average = average + p[token] * gradient(kl.sampled_token(student, teacher, batch, None)[0])
    logits = [completion_logits(m, batch[k], torch.tensor([[0]])) for m, k in ((student, "prompts"), (teacher, "teacher_prompts"))]
    torch.testing.assert_close(average, gradient(sdft_loss(*logits, torch.ones(1, 1))[0]), rtol=1e-4, atol=1e-6)


def test_the_offline_loss_scores_the_given_responses_and_draws_none():
    student, teacher_model = tiny(0, 0.5), tiny(1, 0.5)
    samples, mask = torch.tensor([[1, 0], [3, 2]]), torch.tensor([[True, True], [True, True]])
    batch = {"prompts": [[1, 2]] * 2, "teacher_prompts": [[1, 2, 3]] * 2, "samples": samples.numpy(), "samples_mask": mask.numpy()}
    loss, tokens = on_policy.offline("forward")(student, teacher_model, batch, None)
    logits = [completion_logits(m, batch[k], samples) for m, k in ((student, "prompts"), (teacher_model, "teacher_prompts"))]
    assert tokens == 4 and loss.item() == pytest.approx(sdft_loss(*logits, mask, "forward")[0].item())


def test_training_to_match_stops_at_the_first_look_that_reaches_the_others_accuracy(monkeypatch):
    accuracies = iter([0.6, 0.1, 0.5, 0.6, 0.9])  # the other's, then the student's at every look
    monkeypatch.setattr(common, "evaluate", lambda *a, **kw: ({"X": next(accuracies)}, None))
    torch.manual_seed(0)
    student = GPT(GPTConfig(**common.train_toy.MODEL))
    _, updates = common.train_to_match(student, student, 0, settings.SFT | dict(steps=100), every=2)
    assert updates == 6


# --- Settings and splits --------------------------------------------------------------------------------------------


def test_facts_to_learn_to_choose_by_and_to_keep_are_disjoint_and_cover_the_entities():
    prompts = {part: {toy.decode(p) for q in "AB" for p in toy.facts(part, 3, q)["prompts"]} for part in toy.FACTS}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 200


def test_settings_are_chosen_by_validation_alone_and_among_the_best_by_what_is_kept():
    row = lambda arm, new, prior: {"arm": arm, "metrics": {"val new": [new, new], "val prior": [prior, prior], "new": [0], "prior": [0]}}
    rows = [row("base", 1, 1), row("a, 1 at 1", 0.9, 0.2), row("a, 2 at 1", 0.89, 0.7), row("a, 3 at 1", 0.8, 0.9), row("b, 1 at 1", 0, 0)]
    assert settings.chosen(rows, "val new", "val prior") == {"a": "a, 2 at 1", "b": "b, 1 at 1"}


def test_every_methods_settings_are_what_the_committed_sweeps_say():
    results = report.load(report.RESULTS)
    best = settings.chosen(results["pareto"]["rows"], *report.SWEEPS["pareto"])
    for family, constant in {
        "sft": settings.SFT, "sft own style": settings.SFT_OWN, "sdft": settings.SDFT, "sdft forward": settings.SDFT_FORWARD,
    }.items():  # fmt: skip
        assert best[family] == f"{family}, {constant['steps']} at {constant['lr']:g}"
    best = settings.chosen(results["knowledge"]["rows"], *report.SWEEPS["knowledge"])
    assert best["sdft"] == f"sdft, {settings.SDFT_FACTS['steps']} at {settings.SDFT_FACTS['lr']:g}"


# --- The report -----------------------------------------------------------------------------------------------------


def test_the_readmes_tables_are_what_the_report_writes_from_the_committed_results():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    results = report.load(report.RESULTS)
    assert set(results) == set(report.NAMES)
    assert all(len(r["seeds"]) >= (3 if name == "real_model" else 5) for name, r in results.items())
    assert report.rewritten(text, results) == text


def test_where_nothing_differs_no_claim_holds():
    assert not any(holds.any() for *_, holds, _ in report.claims(lambda *where: np.zeros(5)))


def test_the_report_changes_with_the_results_and_only_in_its_parts():
    text, results = (HERE / "README.md").read_text(encoding="utf-8"), report.load(report.RESULTS)
    results["teacher"]["rows"][0]["metrics"]["accuracy"] = [0.123] * 5
    changed = report.rewritten(text, results)
    assert "0.12 ± 0.00" in changed and changed != text
    outside = lambda t: report.re.sub(r"<!-- \w+ -->.*?<!-- end -->", "", t, flags=report.re.S)
    assert outside(changed) == outside(text)


def test_committed_results_hold_every_arm_and_metric_of_the_code():
    for name, result in report.load(report.RESULTS).items():
        module = importlib.import_module(f"experiments.{name}")
        assert [row["arm"] for row in result["rows"]] == [*module.ARMS]
        for row in result["rows"]:
            seeds = 1 if row["arm"] in getattr(module, "ONCE", ()) else len(result["seeds"])
            assert all(len(v) == seeds for v in row["metrics"].values())
