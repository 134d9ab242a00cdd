"""The scores of gpt2/evaluate.py, on a model that is a lookup table, so that each is known."""

import json
import math

import pytest
import torch
import torch.nn as nn

from gpt2 import evaluate
from gpt2.conftest import BYTES, error_of
from model import GPTConfig

EOS = BYTES.eos_id


class Table(nn.Module):
    """p(b | a) = share for neighbouring bytes (a, b) of the texts; a $ is the end token.

    The rest of the probability is spread over all the 257 tokens; without a neighbour all of it.
    """

    def __init__(self, *texts, share=0.9):
        super().__init__()
        probs = torch.full((257, 257), 1 / 257)
        for ids in map(ids_of, texts):
            for a, b in zip(ids, ids[1:]):
                probs[a] = (1 - share) / 256
                probs[a, b] = share
        self.log_probs = nn.Parameter(probs.log(), requires_grad=False)
        self.config = GPTConfig(block_size=64)

    def hidden(self, tokens, n_pad=None, cache=None):
        return self.log_probs[tokens]

    def lm_head(self, hidden):
        return hidden

    def kv_cache(self, batch_size, max_len):
        return None


def ids_of(text):
    return [EOS if c == "$" else ord(c) for c in text]


def row(prompt, answer, **more):
    ids = {"prompt_ids": ids_of(prompt), "answer_ids": [ids_of(answer), ids_of(f" {answer}")]}
    return ids | {"prompt": prompt, "answer": answer, "teacher_ids": ids["prompt_ids"]} | more


def scores(model, base=None, batch_size=2, **sets):
    sets = dict(train=[], test=[], ood=[], texts=[], questions=[]) | sets
    return evaluate.evaluate(model, sets, BYTES, 8, batch_size, base)


def test_matches_lengths_and_their_sets():
    """Exact and lenient of "test", lenient of the others; an empty set has no score."""
    model = Table("1ab.$", "2c d$", "3$", "4xx")  # which answer nothing to 3, and no end to 4
    test = [row("Q1", "AB"), row("Q2", "c d"), row("2", "d"), row("3", "y"), row("4", "x")]
    ood = [row("1", "ab"), row("1", "b"), row("2", "c"), row("3", "c")]
    out = scores(model, test=test, ood=ood)
    assert out["exact"] == pytest.approx(2 / 5) and out["lenient"] == pytest.approx(3 / 5)
    assert out["length"] == pytest.approx((4 + 4 + 4 + 1 + 8) / 5)  # with the end token
    assert out["ood"] == pytest.approx(2 / 4) and out["kl_to_base"] == 0
    old = {"old a.jsonl": ood, "old b.jsonl": ood[:1], "old c.jsonl": []}
    assert scores(model, **old) == {"old a.jsonl": 0.5, "old b.jsonl": 1.0}


def test_kl_to_base_is_per_token():
    """KL(model ‖ base) of a coin's .9 to .6, at 2 of the 2 + 6 tokens: not a mean over rows."""
    model, base = Table("1a$", "2bcdef$"), Table("1a$", "2bcdef$")
    base.log_probs[ids_of("12")] = Table("1a", "2b", share=0.6).log_probs[ids_of("12")]
    kl = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    out = scores(model, base, test=[row("1", "a"), row("2", "b")])
    assert out["kl_to_base"] == pytest.approx(2 * kl / 8, rel=1e-4)


def test_perplexity_is_exp_of_nats_per_token():
    """Texts of 1, 3 and 4 tokens after the end token: a mean over tokens, not over texts."""
    model = Table("$abz")
    texts = [{"text_ids": ids_of(text)} for text in ("a", "abc", "qrst")]
    probs = [0.9] + [0.9, 0.9, 0.1 / 256] + [0.1 / 256, 1 / 257, 1 / 257, 1 / 257]
    nats = -sum(map(math.log, probs)) / 8
    assert scores(model, texts=texts)["prior_ppl"] == pytest.approx(math.exp(nats), rel=1e-4)


def test_every_token_of_an_answer_must_be_likeliest():
    """One right token is not enough, padding does not count, and of both ways one is enough."""
    model = Table("1abc", "2 xy")
    answers = {("1", "abc"): 1, ("1", "ab"): 1, ("1", "axc"): 0, ("1", "xbc"): 0, ("1", "abx"): 0}
    answers |= {("2", "xy"): 1, ("2", "y"): 0}  # after a space
    questions = [row(*way) for way in answers]
    for question, right in zip(questions, answers.values()):
        assert scores(model, questions=[question])["prior_acc"] == right
    assert scores(model, questions=questions, batch_size=5)["prior_acc"] == pytest.approx(3 / 7)


def test_report_shows_runs_beside_their_base(tmp_path):
    """Two runs from one base share its row; what a run has not measured is a dash."""
    folders = [tmp_path / name for name in "abc"]
    for folder, base in zip(folders, ({"exact": 0.25}, {"exact": 0.25}, {"old A": 0.9})):
        results = {"config": dict(method="sft", steps=4, lr=0.001), "base": base}
        results |= {"final": {"exact": 0.75, "prior_ppl": 3.0}}
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
    head, _, *rows = evaluate.report(folders).splitlines()
    assert head.startswith("| | new exact | lenient |") and head.endswith("| length | old A |")
    scores = "sft, 4 steps, lr 0.001 | 0.75 | - | - | 3.00 | - | - | - | - |"
    a, b, c = (f"| {folder}: {scores}" for folder in folders)
    shared = f"| base of {folders[0]} | 0.25 | - | - | - | - | - | - | - |"
    own = f"| base of {folders[2]} | - | - | - | - | - | - | - | 0.90 |"
    assert rows == [shared, a, b, own, c]
    (folders[2] / "results.json").write_text("{}")
    assert "c is not the --out_dir of a finished run" in error_of("--report", *folders)


def test_what_is_watched():
    """The first 24 training rows, then prior questions with room for a response; 27 in all."""
    new = [row(f"p{i}", "a", teacher_prompt="t", demonstration="d") for i in range(30)]
    prior = [row("x" * n, "b") for n in (3, 4, 5, 4, 4, 4)]
    rows = evaluate.rows_to_watch({"train": new, "questions": prior}, longest=4)
    assert [r["prompt"] for r in rows] == [*(f"p{i}" for i in range(24)), "xxx", "xxxx", "xxxx"]
    texts = dict(kind="prior", prompt="xxx", teacher_prompt="xxx", demonstration="", expected="b")
    assert rows[24] == texts | dict(student_ids=[*b"xxx"], teacher_ids=[*b"xxx"])
    assert (rows[5]["teacher_prompt"], rows[5]["demonstration"]) == ("t", "d")
