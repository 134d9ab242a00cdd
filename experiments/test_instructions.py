"""What experiments/instructions.py guarantees."""

import importlib.util
import re
import sys

import pytest

from experiments import instructions

PACKAGES = ("if_verifiable", "nltk", "langdetect", "immutabledict")
needs_package = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason="needs if-verifiable"
)


@needs_package
def test_prompts_say_what_is_judged():
    """In the package's words, with all arguments, every instruction as often as any other."""
    rows = instructions.load()
    names = [row["instruction"] for row in rows]
    assert len(set(names)) == 23 and {names.count(name) for name in names} == {4, 5}
    for row in rows:
        judge = row["judge"]
        assert row["kwargs"].keys() == (judge.get_instruction_args() or {}).keys()
        assert row["prompt"].endswith(judge.build_description(**row["kwargs"]))


@needs_package
def test_accuracy_is_the_share_that_follows():
    """An empty response follows nothing, not even "no comma"; of two keywords both are wanted."""
    rows = {row["instruction"]: row for row in reversed(instructions.load())}
    said = ["Blue and wide.", "Blue, and wide.", "Wide, and calm.", "", " \n"]
    assert instructions.accuracy([rows["punctuation:no_comma"]] * 5, said) == 0.2
    said = ["A train, far from home.", "A train.", "Home."]
    assert instructions.accuracy([rows["keywords:existence"]] * 3, said) == pytest.approx(1 / 3)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    """One sentence, on any machine."""
    monkeypatch.delitem(sys.modules, "if_verifiable", raising=False)
    monkeypatch.setitem(sys.modules, "langdetect", None)  # importing it now fails
    with pytest.raises(ValueError, match=f"langdetect.*{re.escape(instructions.INSTALL)}$"):
        instructions.load()
