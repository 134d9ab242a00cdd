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


@needs_package
def test_accuracy_is_the_share_that_follows():
    """An empty response follows nothing, not even "no comma"."""
    row = {"instruction": "punctuation:no_comma", "kwargs": {}}
    said = ["Blue and wide.", "Blue, and wide.", "Wide, and calm.", "", " \n"]
    assert instructions.accuracy([row] * 5, said) == 0.2


@needs_package
def test_every_instruction_is_asked_equally_often():
    """Different prompts, of as many "less than" as "at least", give or take, with all arguments."""
    rows = instructions.prompts(0)
    names = [row["instruction"] for row in rows]
    assert len(set(names)) == 23 and {names.count(name) for name in names} == {4, 5}
    assert len({row["prompt"] for row in rows}) == len(rows) == 104
    asked = [row["kwargs"].get("relation") for row in rows if "number_words" in row["instruction"]]
    assert {asked.count("less than"), asked.count("at least")} == {2, 3}
    for row in rows:
        judge, _ = instructions.checker(row["instruction"], row["kwargs"])
        assert row["kwargs"].keys() == (judge.get_instruction_args() or {}).keys()


@needs_package
def test_prompts_depend_on_the_seed_only():
    """Not on the global random states, from which the package draws what it is not given."""
    random.seed(1), np.random.seed(1)
    first = instructions.prompts(0)
    random.seed(2), np.random.seed(2)
    assert instructions.prompts(0) == first != instructions.prompts(1)
    assert instructions.prompts(0, n=30) == first[:30]


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    """One sentence, on any machine."""
    monkeypatch.delitem(sys.modules, "if_verifiable", raising=False)
    monkeypatch.setitem(sys.modules, "langdetect", None)  # importing it now fails
    with pytest.raises(
        ValueError, match=f"langdetect.*install.*{re.escape(instructions.INSTALL)}$"
    ):
        instructions.prompts(0)
