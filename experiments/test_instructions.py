"""What experiments/instructions.py guarantees."""

import importlib.util
import random
import re
import sys

import numpy as np
import pytest

from experiments import instructions

PACKAGES = ("if_verifiable", "nltk", "langdetect", "immutabledict")
needs_package = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason="needs if-verifiable"
)
NUMBER = "length_constraints:number_words"
SEA = "The sea is wide, and it is blue and calm at night."
JUDGED = [  # (instruction, arguments, a response that follows, one that does not)
    ("keywords:existence", {"keywords": ["sea", "warm"]}, "A warm sea.", "A cold sea."),
    ("language:response_language", {"language": "de"}, "Das Meer ist blau und sehr weit.", SEA),
    (NUMBER, {"num_words": 10, "relation": "at least"}, SEA, "The sea is blue."),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. Blue.", "Blue."),
    ("punctuation:no_comma", {}, "It is blue and wide.", SEA),
]


@needs_package
def test_accuracy_is_the_share_that_follows():
    """As a reader would judge; an empty response follows nothing, not even "no comma"."""
    for instruction, kwargs, good, bad in JUDGED:
        row = {"instruction": instruction, "kwargs": kwargs}
        assert instructions.accuracy([row] * 5, [good, bad, bad, "", " \n"]) == 0.2


@needs_package
def test_every_instruction_is_asked_equally_often():
    """Different prompts, of as many "less than" as "at least", give or take, with all arguments."""
    rows = instructions.prompts(0)
    names = [row["instruction"] for row in rows]
    assert len(set(names)) == 23 and {names.count(name) for name in names} == {4, 5}
    assert len({row["prompt"] for row in rows}) == len(rows) == 104
    asked = [row["kwargs"]["relation"] for row in rows if row["instruction"] == NUMBER]
    assert {asked.count("less than"), asked.count("at least")} == {2, 3}
    for row in rows:
        judge, words = instructions.checker(row["instruction"], row["kwargs"])
        given = {k: sorted(v) if isinstance(v, list) else v for k, v in row["kwargs"].items()}
        assert row["prompt"].endswith(f" {words}") and given == (judge.get_instruction_args() or {})
        yes_or_no = row["instruction"] == "detectable_format:constrained_response"
        assert yes_or_no == row["prompt"].startswith(tuple(instructions.QUESTIONS))


@needs_package
def test_prompts_depend_on_the_seed_only():
    """Not on the global random states, from which the package draws what it is not given."""
    random.seed(1), np.random.seed(1)
    first = instructions.prompts(0)
    random.seed(2), np.random.seed(2)
    assert instructions.prompts(0) == first != instructions.prompts(1)
    assert instructions.prompts(0, n=30) == first[:30]


@pytest.mark.parametrize("missing", ["if_verifiable", "langdetect"])
def test_missing_package_is_named_with_the_command(missing, monkeypatch):
    """One sentence, on any machine."""
    for name in [name for name in sys.modules if name.startswith("if_verifiable")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"install.*{re.escape(instructions.INSTALL)}$"):
        instructions.prompts(0)
