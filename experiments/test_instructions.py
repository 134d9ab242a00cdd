"""What experiments/instructions.py guarantees, if the package of IFEval's checkers is there."""

import importlib.util

import pytest

from experiments import instructions

if not all(map(importlib.util.find_spec, ("if_verifiable", "nltk", "langdetect", "immutabledict"))):
    pytest.skip(f"needs if-verifiable: {instructions.INSTALL}", allow_module_level=True)


def test_prompts_say_what_is_judged():
    """In the package's words, with all arguments, every instruction as often as any other."""
    rows = instructions.load()
    names = [row["instruction"] for row in rows]
    assert len(set(names)) == 23 and {names.count(name) for name in names} == {4, 5}
    for row in rows:
        judge = row["judge"]
        assert row["kwargs"].keys() == (judge.get_instruction_args() or {}).keys()
        assert row["prompt"].endswith(judge.build_description(**row["kwargs"]))


def test_accuracy_is_the_share_that_follows():
    """An empty response follows nothing, not even "no comma"; of two keywords both are wanted."""
    rows = {row["instruction"]: row for row in reversed(instructions.load())}
    said = ["Blue and wide.", "Blue, and wide.", "Wide, and calm.", "", " \n"]
    assert instructions.accuracy([rows["punctuation:no_comma"]] * 5, said) == 0.2
    said = ["A train, far from home.", "A train.", "Home."]
    assert instructions.accuracy([rows["keywords:existence"]] * 3, said) == pytest.approx(1 / 3)
