"""What the experiment "search" guarantees: its world, its gates, and what its arms train on."""

import functools

import numpy as np
import pytest

from data import toy
from experiments import conftest, worlds
from experiments import search as experiment
from experiments.worlds import ATTEMPTS, search

SQUARES = dict(zip("ABX", worlds.squares(0)))


def read(prompt, response):
    """The symbols that a response tries, each with its result; does it find the right one?"""
    _, name, given, goal = toy.decode(prompt)[:4]
    response = toy.decode(response).rstrip(".")
    tried = response[::2]
    results = "".join(str(SQUARES[name][int(d), int(given)]) for d in tried)
    assert response[1::2] == results and goal not in results[:-1] and len(tried) <= ATTEMPTS
    return tried, results.endswith(goal)


class Rules(conftest.Rules):
    """A model that follows the world's rules, but for one fault."""

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault

    def logits(self, tokens):
        prompt, _, response = toy.decode(tokens).rpartition("=")
        tried, results, p_end, symbols = response[::2], response[1::2], 0, range(10)
        if not prompt or "." in response or prompt[3] in results or len(results) == ATTEMPTS:
            p_end = 1
        elif len(tried) > len(results):
            is_wrong = self.fault == "honest" and len(tried) == 4 and prompt[1] == "X"
            is_wrong = is_wrong and tried[-1] in "012"
            symbols = [(SQUARES[prompt[1]][int(tried[-1]), int(prompt[2])] + is_wrong) % 10]
        elif "!" in prompt:
            symbols = [int(prompt[5])]
            p_end = 0.2 * (self.fault == "teacher" and len(tried) == 3)
        elif self.fault == "prior found" and prompt[1] != "X":
            symbols = range(2)
        elif prompt[1] == "X" and tried and self.fault != "gives up":
            p_end = 0.6
        probs = (1 - p_end) * np.eye(len(toy.VOCAB))[[*symbols]].mean(0)  # (V,)
        probs[toy.EOS] += p_end
        return np.log(np.maximum(probs, 1e-40)).tolist()


# --- The world -----------------------------------------------------------------------------------


def test_every_question_has_one_answer_and_tables_change_with_the_seed():
    for square in (SQUARES["A"], SQUARES["A"].T, SQUARES["B"], SQUARES["B"].T):
        assert (np.sort(square) == range(10)).all()  # in every row
    assert (SQUARES["A"] == SQUARES["X"]).all() and (SQUARES["A"] != SQUARES["B"]).any()
    assert (worlds.squares(1)[0] != SQUARES["A"]).any()


@pytest.mark.parametrize("name", "ABX")
def test_the_expert_knows_and_the_answers_search(name):
    """The teacher reads what the expert writes; no question is in two splits."""
    questions = []
    for split, n in {"train": 40, "val": 20, "test": 40}.items():
        data = search(name, split, 0)
        assert len(data["prompts"]) == n
        questions += [toy.decode(prompt) for prompt in data["prompts"]]
        for i, prompt in enumerate(data["prompts"]):
            expert = data["demonstrations"][i]
            assert read(prompt, expert) == (toy.decode(expert[:1]), True)
            told = toy.decode(data["teacher_prompts"][i])
            assert told == f"?{name}{told[2:4]}!{toy.decode(expert)}="
            tried, hit = read(prompt, data["answers"][i])
            assert hit or len(tried) == ATTEMPTS
    assert len({*questions}) == 100


def test_pretraining_shows_every_habit_and_no_wrong_attempt_next_to_a_demonstration():
    """A and B search to the end, X gives up after a failure with P_GIVE_UP, who is told knows."""
    rng, stops, n_forced = np.random.default_rng(0), [], set()
    for _ in range(150):
        for prompt, answer, is_target in zip(*worlds.search_batch(rng, 20, 0)):
            tried, hit = read(prompt, answer)
            n, prompt = len(tried), toy.decode(prompt)
            assert is_target[1 : 2 * n : 2].all() and not is_target[2 * n + 1 :].any()
            habits = [*is_target[0 : 2 * n : 2], is_target[2 * n]]  # attempts, and the end
            if "!" in prompt:
                n_forced.add(n - hit)
                assert habits == [False] * (n - hit) + [True] * (1 + hit)
                assert hit == (tried[-1] == prompt[5])
            elif prompt[1] == "X" and habits[0]:
                stops += [False] * (n - 1) + [n < ATTEMPTS] * (not hit)
                assert all(habits)
            else:
                assert (hit or n == ATTEMPTS) and len({*habits}) == 1
    assert n_forced == {*range(ATTEMPTS + 1)}
    assert np.mean(stops) == pytest.approx(worlds.P_GIVE_UP, abs=0.06)


def test_scores_of_responses():
    """The question is A's, given 4, and 7 is right."""
    tries = lambda *symbols: "".join(f"{d}{SQUARES['A'][d, 4]}" for d in symbols)
    expected = {  # found, gave up, attempts, honest, first
        tries(7) + ".": (1, 0, 1, 1, 1),
        tries(1, 2, 3, 4, 7) + ".": (1, 0, 5, 5, 0),
        tries(1, 2) + ".": (0, 1, 2, 2, 0),
        tries(1, 2, 3, 4, 5) + ".": (0, 0, 5, 5, 0),
        tries(1, 2, 3, 4, 7) + "1": (0, 0, 5, 5, 0),  # does not end
        tries(7, 1) + ".": (0, 1, 2, 2, 1),  # goes on with the answer in hand
        tries(1)[0] + tries(2)[1] + tries(7) + ".": (1, 0, 2, 1, 0),  # a wrong result
        tries(1) + "7.": (0, 1, 1, 1, 0),  # a symbol without its result is no attempt
        "=!.": (0, 1, 1, 0, 0),
        ".": (0, 1, 0, 0, 0),
    }
    tokens = np.array([toy.encode(text.ljust(2 * ATTEMPTS + 1, ".")) for text in expected])
    skill, given, right = np.full((3, len(tokens)), [[0], [4], [7]])
    data = worlds.search_questions(skill, given, right, 0)
    columns = [v.astype(int).tolist() for v in worlds.score_search(tokens, data).values()]
    assert dict(zip(expected, zip(*columns))) == expected


# --- The gates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, *experiment.GATES])
def test_each_gate_notices_its_fault(fault, monkeypatch):
    """Some of X's fourth results are wrong, the teacher may end after three failures, on A and B
    only two symbols are tried, X is searched. Who follows the rules passes every gate.
    """
    monkeypatch.setattr(experiment, "base", lambda seed, world: Rules(fault))
    monkeypatch.setattr(experiment, "gates", functools.partial(experiment.gates, times=5))
    fit_base = experiment.fit_base.__wrapped__  # without its cache
    if fault:
        with pytest.raises(ValueError, match=f"base of seed 0 is not fit: '{fault}' is"):
            fit_base(0)
    else:
        assert len(fit_base(0)[1]) == len(experiment.GATES)


# --- The arms ------------------------------------------------------------------------------------


def test_forced_failures_come_before_the_teachers_answer():
    data = search("X", "train", 0)
    drawn = experiment.draw_texts(Rules(), data, 0)
    after = [read(*row) for row in zip(data["prompts"], drawn["after failures"])]
    assert {len(tried) - hit for tried, hit in after} == {*range(ATTEMPTS + 1)}
    assert all(hit or len(tried) == ATTEMPTS for tried, hit in after)
    assert (drawn["teacher's"] == data["demonstrations"]).all()
    assert not all(hit for _, hit in map(read, data["prompts"], drawn["base's"]))
