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
SEA = "The sea is wide, and it is blue and calm at night."
TWO, LESS, LEAST = {"num_paragraphs": 2}, {"relation": "less than"}, {"relation": "at least"}
LETTERS = {"letter": "s", "let_frequency": 4}
WORDS, NUMBER = {"keywords": ["sea", "warm"]}, "length_constraints:number_words"
SECTIONS = {"section_spliter": "Section", "num_sections": 2}
# (instruction, arguments, a response that follows, one that does not)
JUDGED = [
    ("keywords:existence", WORDS, "A warm sea.", "A cold sea."),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2} | LEAST, "Sea, sea!", SEA),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2} | LESS, SEA, "Sea, sea!"),
    ("keywords:forbidden_words", {"forbidden_words": ["sea", "warm"]}, "It is blue.", SEA),
    (
        "keywords:letter_frequency",
        LETTERS | {"let_relation": "at least"},
        "Sea shells sing.",
        "Sss.",
    ),
    ("keywords:letter_frequency", LETTERS | {"let_relation": "less than"}, "Sss.", "Sssss."),
    ("language:response_language", {"language": "de"}, "Das Meer ist blau und sehr weit.", SEA),
    ("length_constraints:number_paragraphs", TWO, "Sea.\n***\nSky.", "Sea.\n\nSky."),
    (NUMBER, {"num_words": 10} | LEAST, SEA, "The sea is blue."),
    (NUMBER, {"num_words": 10} | LESS, "The sea is blue.", SEA),
    (
        "length_constraints:nth_paragraph_first_word",
        TWO | {"nth_paragraph": 2, "first_word": "often"},
        "It is.\n\nOften so.",
        "Often.\n\nIt is.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[sea] of [city]", "[sea]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Sea. P.S. Swim!", "Sea. PS"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Sea. P.P.S Go!", "P.S. No"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* Blue\n* Wide", "* Blue"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*A* *B*", "*A*"),
    ("detectable_format:multiple_sections", SECTIONS, "Section 1\nA\nSection 2\nB", "Section 1"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. Blue.", "Blue."),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, "Blue. Any questions?", "Why?"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:json_format", {}, '{"sea": "blue"}', '{"sea": "bl'),
    ("detectable_format:title", {}, "<<The sea>>\nIt is blue.", "The sea\nIt is blue."),
    ("combination:two_responses", {}, "It is blue.\n******\nIt is wide.", "Blue.\n******\nBlue."),
    ("startend:quotation", {}, '"It is blue."', '"It is" blue.'),
    ("punctuation:no_comma", {}, "It is blue and wide.", SEA),
    ("change_case:english_capital", {}, SEA.upper(), SEA),
    ("change_case:english_lowercase", {}, SEA.lower(), SEA),
]


@needs_package
@pytest.mark.parametrize("instruction, kwargs, good, bad", JUDGED)
def test_checker_judges_as_a_reader_would(instruction, kwargs, good, bad):
    """And a response that follows has at most 48 words and signs, about a token each."""
    row = {"instruction": instruction, "kwargs": kwargs}
    assert instructions.accuracy([row] * 5, [good, bad, bad, "", " \n"]) == 0.2
    assert len(re.findall(r"\w+|\S", good)) <= 48


@needs_package
def test_every_instruction_is_asked_equally_often():
    """Different prompts, all judged above, as many "less than" as "at least", give or take."""
    rows = instructions.prompts(0)
    names = [row["instruction"] for row in rows]
    assert set(names) == {name for name, *_ in JUDGED}
    assert {names.count(name) for name in names} == {4, 5}
    assert len({row["prompt"] for row in rows}) == len(rows) == 104
    asked = [row["kwargs"]["relation"] for row in rows if row["instruction"] == NUMBER]
    assert {asked.count("less than"), asked.count("at least")} == {2, 3}


@needs_package
def test_prompts_depend_on_the_seed_only():
    """Not on the global random states, from which the package draws what it is not given."""
    random.seed(1), np.random.seed(1)
    first = instructions.prompts(0)
    random.seed(2), np.random.seed(2)
    assert instructions.prompts(0) == first != instructions.prompts(1)
    assert instructions.prompts(0, n=30) == first[:30]


@needs_package
def test_prompt_states_the_instruction_with_its_arguments():
    """What the checker asks for stands in the prompt: the package keeps all that it is given."""
    for row in instructions.prompts(0):
        judge, words = instructions.checker(row["instruction"], row["kwargs"])
        given = {k: sorted(v) if isinstance(v, list) else v for k, v in row["kwargs"].items()}
        assert row["prompt"].endswith(f" {words}") and given == (judge.get_instruction_args() or {})


@pytest.mark.parametrize("missing", ["if_verifiable", "langdetect"])
def test_missing_package_is_named_with_the_command(missing, monkeypatch):
    """One sentence, on any machine."""
    for name in [name for name in sys.modules if name.startswith("if_verifiable")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"install.*{re.escape(instructions.INSTALL)}$"):
        instructions.prompts(0)
