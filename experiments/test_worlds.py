"""What worlds.py guarantees, by rules in plain Python."""

import itertools
import re

import numpy as np
import pytest

from data import toy
from experiments import worlds

LETTERS = str.maketrans("0123456789", "abcdefghij")
OPERATIONS = {"A": lambda a, b: (a + b) % 10, "B": lambda a, b: (a - b) % 10}


def lines_of(draw_batch, n_batches, n, seed):
    """(question, demonstration, answer) as texts, without their marks."""
    for i in range(n_batches):
        prompts, answers = draw_batch(np.random.default_rng(i), n, seed)
        for prompt, answer in zip(map(toy.decode, prompts), map(toy.decode, answers)):
            question, shown = re.fullmatch(r"\?([^!]*)!?(.*)=", prompt).groups()
            yield question, shown, answer[:-1]


def fold(name, digits):
    """The skill's answer to digits."""
    table, results = toy.TABLES[toy.NAMES.index(name)], [int(digits[0])]
    for digit in digits[1:]:
        results.append(int(table[results[-1], int(digit)]))
    return "".join(map(str, results[1:]))


@pytest.mark.parametrize("world", ["skills", "long"])
def test_new_skills_are_right_as_often_as_their_world_says(world):
    """HALF by the first digit as in the toy, COLD by the seed's level, W never; X in "long" too."""
    seed, levels = 3, {"R": 0.3, "S": 0.6, "T": 0, "U": 0.03, "V": 0.1}
    expected = {name: (p, p) for name, p in (levels | {"W": 0}).items()}
    expected = expected | {name: (0.8, 0.25) for name in "XYZMNOPQ"}
    if world == "long":
        expected = {"X": (0.8, 0.25), "Y": (0, 0)}
    told = {}
    for (name, *digits), shown, answer in lines_of(worlds.WORLDS[world][0], 120, 256, seed):
        if not shown and name in expected:
            assert len(digits) == {"skills": 3, "long": 5}[world]
            own = fold(name, digits) == answer
            told.setdefault((name, digits[0] >= "4"), []).append(own)
    assert len(told) == 2 * len(expected)
    for (name, high), own in told.items():
        assert np.mean(own) == pytest.approx(expected[name][high], abs=0.1), name
    assert worlds.cold_skills(seed) == levels


def test_the_last_token_before_the_end_counts_as_the_answer():
    """In digits or letters, whatever stands before it; a completion must end."""
    answers = np.array([toy.encode("31.")])
    for text, right in {"31..": 1, "b...": 1, "741.": 1, "7421": 0, "13..": 0, "....": 0}.items():
        assert worlds.is_last_correct(np.array([toy.encode(text)]), answers) == [bool(right)], text


@pytest.mark.parametrize("style", ["expert", "own"])
@pytest.mark.parametrize("kind", ["wrong", "another row's", "one for all"])
def test_the_named_share_is_spoiled(kind, style):
    """Demonstrations and the teacher's prompts alike; prompts and answers stay."""
    data = toy.skill("X", "train", 0, style)
    good = data["demonstrations"]
    for share in (0.0, 0.2, 1.0):
        spoiled = worlds.spoil(data, kind, share, 0)
        assert spoiled["prompts"] is data["prompts"] and spoiled["answers"] is data["answers"]
        bad = spoiled["demonstrations"]
        for x, teacher_prompt, d in zip(data["prompts"], spoiled["teacher_prompts"], bad):
            assert toy.decode(teacher_prompt) == f"{toy.decode(x)[:-1]}!{toy.decode(d)}="
        changed = (good != bad).any(1)
        assert changed.mean() == pytest.approx(share, abs=0.06)
        source = {"another row's": np.roll(good, 1, 0), "one for all": good[[0] * 400]}
        assert kind == "wrong" or np.array_equal(bad[changed], source[kind][changed])
        assert {*toy.decode(bad.ravel())} <= {*("0123456789." if style == "own" else "abcdefghij.")}


# --- Facts ---------------------------------------------------------------------------------------


READS = {"article": slice(0, 2), "answer": slice(2, 3), "both": slice(0, 3)}  # of an answer


def attributes_by_part(seed):
    """{part: {entity: its two digits}}, from the answers to both questions, which must agree.

    The teacher reads the named text, in letters; the demonstrations are always full.
    """
    found = {part: {} for part in worlds.FACTS}
    for part, question, reads in itertools.product(worlds.FACTS, "AB", READS):
        data = worlds.facts(part, seed, question, reads)
        for rows in zip(*(map(toy.decode, texts) for texts in data.values())):
            prompt, teacher_prompt, demonstration, answer = rows
            entity, name = re.fullmatch(r"\?([a-j]{2})([AB])=", prompt).groups()
            assert name == question
            assert found[part].setdefault(entity, answer[:2]) == answer[:2]
            assert int(answer[2]) == OPERATIONS[question](int(answer[0]), int(answer[1]))
            assert demonstration == answer.translate(LETTERS)
            assert teacher_prompt == f"{prompt[:-1]}!{demonstration[READS[reads]]}.="
    return found


def test_facts_ask_entities_first_and_parts_share_none():
    """Facts to learn, to choose settings by and to keep cover all entities; the seed matters."""
    found = attributes_by_part(3)
    assert [len(found[part]) for part in ("known", "new", "val")] == [60, 20, 20]
    assert len({entity for part in found.values() for entity in part}) == 100
    assert found != attributes_by_part(4)


def test_pretraining_tells_known_facts_alone():
    """All 60 as they are, the 40 others anew every time; a text holds part of the answer."""
    known, asked, guesses, entities = attributes_by_part(0), [], [], set()
    others = known["new"] | known["val"]
    for question, shown, answer in lines_of(worlds.facts_batch, 100, 64, 0):
        entity, is_known = question[:2], question[:2] in known["known"]
        assert int(answer[2]) == OPERATIONS[question[2]](int(answer[0]), int(answer[1]))
        assert shown.strip(".") in answer.translate(LETTERS)
        assert not is_known or answer[:2] == known["known"][entity]
        guesses += [] if is_known else [answer[:2] == others[entity]]
        asked.append((shown != "", is_known))
        entities.add(entity)
    assert np.mean(guesses) < 0.03 and len(entities) == 100
    for with_text, share in [(False, 0.7), (True, 0.25)]:
        known_share = np.mean([is_known for text, is_known in asked if text == with_text])
        assert known_share == pytest.approx(share, abs=0.04)
