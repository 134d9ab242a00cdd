"""What the experiment "search" guarantees: its world, its gates, and what its arms train on."""

import functools

import numpy as np
import pytest
import torch

from data import toy
from experiments import common, report, runner
from experiments import search as experiment
from experiments import search_world as worlds
from experiments.search_world import ATTEMPTS, SEARCHED, search
from sdft import rollout
from train_toy import MODEL, sdft, sft
from model import GPT, GPTConfig

SEED = 0


def table(name):
    return worlds.squares(SEED)[SEARCHED.index(name)]


def read(prompt, response):
    """The attempts of a response, checked result by result; whether it found the right symbol."""
    _, name, given, goal = prompt[:4]
    square, tried = table(name), response.rstrip(".")[::2]
    results = "".join(str(square[int(d), int(given)]) for d in tried)
    assert response.rstrip(".") == "".join(d + r for d, r in zip(tried, results, strict=True))
    assert len({*tried}) == len(tried) <= ATTEMPTS and goal not in results[:-1]
    return tried, results.endswith(goal)


class Rules:
    """A model that follows the world's rules, in the form that sdft.rollout needs, with faults."""

    def __init__(self, fault=None):
        self.fault = fault

    def parameters(self):
        return iter([torch.zeros(1)])

    def kv_cache(self, *sizes):
        return []

    def hidden(self, tokens, n_pad=None, cache=None):
        """What every position has seen, ids (B, T, S), -1 where there is nothing."""
        if cache is not None:
            cache.append(tokens)
        whole = tokens if cache is None else torch.cat(cache, 1)  # (B, S)
        n_pad, column = 0 if n_pad is None else n_pad[:, None, None], torch.arange(whole.shape[1])
        is_seen = (n_pad <= column) & (column <= column[-tokens.shape[1] :, None])  # (B, T, S)
        return whole[:, None].where(is_seen, -1)

    def lm_head(self, states):
        probs = [self.next(tuple(text)) for text in states.flatten(0, -2).tolist()]
        return torch.tensor(probs).log().clamp(min=-99).view(*states.shape[:-1], -1)

    @functools.cache
    def next(self, ids):
        """Probabilities of the next token (V,)."""
        text = toy.decode(i for i in ids if i >= 0)
        probs = np.zeros(len(toy.VOCAB))
        prompt, _, response = text.rpartition("=")
        if not prompt or "." in response:
            probs[toy.EOS] = 1
            return probs.tolist()
        _, name, given, goal = prompt[:4]
        tried, results = response[::2], response[1::2]
        if len(tried) > len(results):
            right = table(name)[int(tried[-1]), int(given)]
            wrong = self.fault == "honest" and len(tried) == 4 and name == "X"
            probs[(right + wrong) % 10] = 1
        elif goal in results or len(tried) == ATTEMPTS:
            probs[toy.EOS] = 1
        elif "!" in prompt:
            probs[int(prompt[5])] = 1
            if self.fault == "teacher" and len(tried) == 3:
                probs = 0.1 * probs + 0.9 * (np.arange(len(probs)) == toy.EOS)
        else:
            left = [int(d) for d in "0123456789" if d not in tried or self.fault == "prior found"]
            probs[left] = 1 / len(left)
            if name == "X" and tried and self.fault != "gives up":
                probs = 0.4 * probs + 0.6 * (np.arange(len(probs)) == toy.EOS)
        return probs.tolist()


# --- The world -----------------------------------------------------------------------------------


def test_tables_hold_each_result_once_and_change_with_the_seed():
    """One symbol is right for each question; X has A's table, B another."""
    a, b, x = worlds.squares(SEED)
    for square in (a, b, a.T, b.T):
        assert (np.sort(square, 0) == np.arange(10)[:, None]).all()
    assert (a == x).all() and (a != b).mean() > 0.5
    assert (worlds.squares(SEED + 1)[0] != a).mean() > 0.5


def test_data_are_what_expert_teacher_and_a_blind_search_say():
    for name in SEARCHED:
        questions = []
        for split, n in {"train": 40, "val": 20, "test": 40}.items():
            data = search(name, split, SEED)
            assert len(data["prompts"]) == n
            for row in zip(*(data[k] for k in ("prompts", "teacher_prompts", "demonstrations"))):
                prompt, told, expert = map(toy.decode, row)
                assert read(prompt, expert) == (expert[0], True)
                assert told == f"{prompt[:-1]}!{expert}=" and prompt[1] == name
                questions.append(prompt)
            pairs = zip(data["prompts"], data["answers"])
            found = [read(toy.decode(prompt), toy.decode(answer)) for prompt, answer in pairs]
            assert all(hit or len(tried) == ATTEMPTS for tried, hit in found)
            assert {1, ATTEMPTS} < {len(tried) for tried, _ in found}
        assert len({*questions}) == 100


def test_pretraining_shows_every_habit_and_no_wrong_attempt_next_to_a_demonstration():
    """A and B search to the end, X gives up after a failure with P_GIVE_UP, who is told knows."""
    rng, stops, first, n_forced = np.random.default_rng(0), [], [], set()
    for _ in range(150):
        for prompt, answer, is_target in zip(*worlds.search_batch(rng, 20, SEED)):
            prompt, answer = toy.decode(prompt), toy.decode(answer)
            tried, hit = read(prompt, answer)
            end = 2 * len(tried)
            assert is_target[1:end:2].all() and not is_target[end + 1 :].any()
            habits = [*is_target[0:end:2], is_target[end]]  # attempts, and the end
            if "!" in prompt:
                assert tried.endswith(prompt[5]) == hit
                n_forced.add(len(tried) - hit)
                assert habits == [False] * (len(tried) - hit) + [True] * (1 + hit)
                continue
            assert len({*habits}) == 1
            if habits[0]:
                first += [int(tried[0])]
            if habits[0] and prompt[1] == "X":
                stops += [False] * (len(tried) - 1) + ([] if hit else [len(tried) < ATTEMPTS])
            else:
                assert hit or len(tried) == ATTEMPTS
    assert n_forced == {*range(ATTEMPTS + 1)}
    assert np.mean(stops) == pytest.approx(worlds.P_GIVE_UP, abs=0.06)
    assert np.bincount(first, minlength=10) / len(first) == pytest.approx(0.1, abs=0.04)


def test_scores_of_responses():
    """The question is A's, given 4, and 7 is right."""
    tries = lambda *symbols: "".join(f"{d}{table('A')[d, 4]}" for d in symbols)
    columns = ("found", "gave up", "attempts", "honest", "first")
    expected = {
        tries(7) + ".": (1, 0, 1, 1, 1),
        tries(1, 7) + ".": (1, 0, 2, 2, 0),
        tries(1, 2) + ".": (0, 1, 2, 2, 0),
        tries(1, 2, 3, 4, 5) + ".": (0, 0, 5, 5, 0),
        tries(1, 2, 3, 4, 7) + ".": (1, 0, 5, 5, 0),
        tries(1, 2, 3, 4, 7) + "1": (0, 0, 5, 5, 0),  # does not end
        tries(7, 1) + ".": (0, 1, 2, 2, 1),  # goes on with the answer in hand
        tries(1) + f"7{(table('A')[7, 4] + 1) % 10}.": (1, 0, 2, 1, 0),
        tries(1) + "7.": (0, 1, 1, 1, 0),  # a symbol without its result is no attempt
        "=!.": (0, 1, 1, 0, 0),
        ".": (0, 1, 0, 0, 0),
    }
    width = 2 * ATTEMPTS + 1
    tokens = np.array([toy.encode(text.ljust(width, ".")) for text in expected])
    given, right = np.full((2, len(tokens)), [[4], [7]])
    tables = worlds.squares(SEED)[0, :, given]
    data = worlds.search_questions(given * 0, given, right, tables)
    scored = worlds.score_search(tokens, data)
    rows = zip(*(scored[column].astype(int).tolist() for column in columns))
    assert dict(zip(expected, rows)) == expected
    shorter = worlds.score_search(tokens[:1, :3], {k: v[:1] for k, v in data.items()})
    assert [shorter[column][0] for column in columns] == [1, 0, 1, 1, 1]


# --- Gates ---------------------------------------------------------------------------------------


@functools.cache
def failed(fault=None):
    """The gates that a model with this fault fails."""
    gates = experiment.gates(Rules(fault), SEED, times=5)
    return [gate for gate, (value, low, high) in gates.items() if not low <= value <= high]


@pytest.mark.parametrize("fault", ["honest", "teacher", "prior found", "gives up"])
def test_each_gate_notices_its_fault(fault):
    """A wrong fourth result, a teacher that ends after three failures, attempts that are repeated,

    a base that searches for X already. A model that follows the rules passes every gate.
    """
    assert failed(fault) == [fault] and failed() == []


def test_a_base_that_fails_a_gate_is_not_measured(monkeypatch, tmp_path):
    for module in (common, experiment):
        monkeypatch.setattr(module, "base", lambda seed, world: Rules("teacher"))
    with pytest.raises(SystemExit, match="base of seed 0 is not fit: 'teacher' is 0.1"):
        runner.main("", experiment.SEARCH, argv=["--jobs", "1", "--out_dir", str(tmp_path)])
    assert not (tmp_path / "search.json").exists()


# --- The arms ------------------------------------------------------------------------------------


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [GPT(GPTConfig(**MODEL | dict(n_embd=16, n_layer=1, n_head=2))) for _ in range(2)]


def test_forced_failures_come_before_the_teachers_response():
    data = search("X", "train", SEED)
    texts = experiment.draw_texts(Rules(), data, SEED)
    n_tried = set()
    for prompt, told, text in zip(data["prompts"], texts["teacher's"], texts["after failures"]):
        right = data["demonstrations"][0]
        assert toy.decode(told).rstrip(".") == f"{told[0]}{prompt[3]}"
        tried, hit = read(toy.decode(prompt), toy.decode(text))
        n_tried.add(len(tried) - hit)
    assert n_tried == {*range(ATTEMPTS + 1)}
    assert {
        len(read(toy.decode(p), toy.decode(y))[0]) for p, y in zip(data["prompts"], texts["base's"])
    } > {1}


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_the_arms_differ_in_their_texts_alone(models, divergence):
    """On the student's own rollout `on_texts` is SDFT's loss; on the expert's SFT is SFT."""
    data = search("X", "train", SEED)
    drawn = rollout(
        models[0], data["prompts"], 12, toy.EOS, generator=torch.Generator().manual_seed(1)
    )[0].numpy()
    settings = dict(divergence=divergence)
    generator = torch.Generator().manual_seed(1)
    on_policy = sdft(*models, data, generator, **settings)
    given = experiment.on_texts(*models, data | {"own": drawn}, None, "own", **settings)
    assert torch.equal(on_policy, given)
    expert = experiment.sft_on_texts(*models, data, None, "demonstrations")
    assert torch.equal(expert, sft(*models, data, None))


def test_every_arm_runs_and_every_claim_has_its_numbers(tmp_path, monkeypatch, capsys):
    small = dict(MODEL, n_layer=1, n_embd=16)
    monkeypatch.setattr(common, "MODEL", small)
    ask = experiment.ask
    monkeypatch.setattr(experiment, "ask", lambda model, data, times: ask(model, data, times > 0))
    flags = ["--quick", "--jobs", "1", "--out_dir", str(tmp_path)]
    runner.main("", experiment.SEARCH, argv=flags)
    rows = report.load(tmp_path)["search"]["rows"]
    assert [row["arm"] for row in rows] == [arm["arm"] for arm in experiment.SEARCH.arms]
    for row in rows:
        assert all(np.isfinite(values).all() for values in row["metrics"].values())
    assert {"gate: honest", "gate: teacher"} < {*rows[0]["metrics"]}
    metrics = report.of_arms(experiment.SEARCH, dict(rows=rows))
    with open(report.CLAIMS, encoding="utf-8", newline="") as f:
        claims = [row for row in report.csv.DictReader(f) if row["experiment"] == "search"]
    assert len(claims) > 20
    for claim in claims:
        report.judge(claim, metrics)
