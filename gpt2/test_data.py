"""What gpt2/data.py guarantees about rows, encodings and minibatches. CPU only, offline."""

import json
import re

import pytest

from data.scoring import contains
from gpt2.conftest import BYTES, ROOT, write_rows
from gpt2.data import ALIASES, TEMPLATES, RowReader, minibatch, read_template
from sdft import teacher_context

ROW = {"prompt": "Where?\n", "demonstration": "In the hat.", "article": "A hat.", "answer": "hat"}


def read(path, kind="training", block_size=320, max_new_tokens=8, **settings):
    reader = RowReader(BYTES, block_size, max_new_tokens, **settings)
    return reader.read(path, getattr(reader, kind))


READS = {  # flag: the teacher's prompt, and the field that a row needs for it
    "article": ("A hat.\n\nWhere?\n", "article"),
    "demonstration": (teacher_context("Where?\n", "In the hat."), "demonstration"),
    "both": ("A hat.\n\n" + teacher_context("Where?\n", "In the hat."), "demonstration"),
}


@pytest.mark.parametrize("reads", READS)
def test_the_teacher_reads_what_its_flag_names(reads, tmp_path):
    """A row needs it, else the teacher would silently read less; `both` does without an article."""
    path, template, (expected, needed) = tmp_path / "d.jsonl", TEMPLATES[reads], READS[reads]
    (row,) = read(write_rows(path, [ROW]), template=template)
    assert BYTES.decode(row["teacher_ids"]) == row["teacher_prompt"] == expected
    assert row["prompt_ids"] == [*b"Where?\n"]  # the student reads no more
    assert row["demonstration_ids"] == [*b"In the hat.", 256]  # and learns to end
    without = {name: ROW | {name: None} for name in ("article", "demonstration")}
    write_rows(path, [ROW, without.pop(needed)])
    with pytest.raises(ValueError, match=f"d.jsonl:2: {needed} is missing"):
        read(path, template=template)
    assert len(read(write_rows(path, without.values()), template=template)) == 1
    with pytest.raises(ValueError, match="d.jsonl:1: demonstration is missing"):  # for SFT
        read(write_rows(path, [ROW | {"demonstration": None}]), template=template, imitates=True)


def test_a_template_file_is_taken_as_it_stands(tmp_path):
    """Braces in it or in the data are text; a placeholder may come twice."""
    path = write_rows(tmp_path / "d.jsonl", [ROW | {"demonstration": "{prompt} {x}"}])
    (tmp_path / "t.txt").write_text("{article}|{prompt}|{demonstration}|{prompt}{ }{}")
    (row,) = read(path, template=read_template(tmp_path / "t.txt"))
    assert row["teacher_prompt"] == "A hat.|Where?\n|{prompt} {x}|Where?\n{ }{}"


LINE = json.dumps(ROW).encode()
TEMPLATE_LINES = [b"{prompt} {article} {demo}", b"{demonstration}", b"{prompt} {prompt}"]
BAD_LINES = [  # and a word of the message
    *((value, "not JSON") for value in (LINE[:40], b"{}{}", b"{'prompt': 1}", b"[" * 100_000)),
    *((value, "in place of an object") for value in (b"null", b"[{}]")),
    (LINE[:13] + b"\xff" + LINE[13:], "UTF-8"),
    *((json.dumps(ROW | {alias: "D"}).encode(), "same field") for alias in ALIASES),
    (json.dumps({"messages": [{"role": "user"}]}).encode(), "messages are not read; write prompt"),
    *((json.dumps(ROW | {f: " \n"}).encode(), f"{f} is missing, empty or no text") for f in ROW),
    (json.dumps(ROW | {"answer": 7}).encode(), "answer is missing, empty or no text"),
]


def test_every_bad_line_is_named_by_number(tmp_path):
    """File, line and what is wrong. A mistyped placeholder would be read as text."""
    path = tmp_path / "bad.jsonl"
    for bad, word in BAD_LINES:
        path.write_bytes(LINE + b"\n" + bad + b"\n" + LINE)
        with pytest.raises(ValueError) as error:
            read(path)
        message = str(error.value)
        assert f"{path}:2: " in message and word in message, (bad[:80], message)
    for more in ({"prompt": "P"}, {"answer": "A"}):
        write_rows(path, [{"text": "T"}, {"text": "T"} | more])
        with pytest.raises(ValueError, match="bad.jsonl:2: text beside prompt or answer"):
            read(path, "prior")
    for bad in TEMPLATE_LINES:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="bad.jsonl: a template needs {prompt}, and "):
            read_template(path)


def test_what_is_odd_is_noted(tmp_path, capsys):
    """Names of TRL and of old, a byte order mark, nulls; a mistyped answer; "Q:" beside "A"."""
    row = {"prompt": "Q:", "privileged_context": "D", "context": "A", "anwser": "D"}
    row |= {"answer": None, "demonstration": None}
    others = [{"prompt": "Q:", "completion": " A"}, {"prompt": "Q:\n", "demonstration": "A"}]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, [row, *others])).encode())
    assert read(path)[0]["teacher_prompt"] == "A\n\n" + teacher_context("Q:", "D")
    unused, glued = capsys.readouterr().out.splitlines()
    assert re.search(r"not used, 1 in all, the first at 'anwser' \(.*d.jsonl:1\)", unused)
    assert re.search(r"meet without .*, 1 in all, the first at .*d.jsonl:1$", glued)


SFT, LONG = {"template": TEMPLATES["article"], "imitates": True}, "long " * 9
NEEDS = [  # kind of row, row, settings of the reader, tokens of one byte each
    ("training", ROW, {}, "A hat.\n\n" + teacher_context("Where?\n", "In the hat.") + "8" * 8),
    ("training", ROW | {"demonstration": LONG}, SFT, "Where?\n" + LONG + "$"),  # the end token
    ("task", ROW, {}, "Where?\n" + "8" * 8),
    ("prior", {"text": "some text"}, {}, "some text"),
    ("prior", {"prompt": "Where?\n", "answer": "hat"}, {}, "Where?\n hat"),
]


@pytest.mark.parametrize("kind, row, settings, tokens", NEEDS)
def test_a_row_may_fill_the_block_exactly(kind, row, settings, tokens, tmp_path, capsys):
    """One token less of block_size is an error, or the row is dropped and counted."""
    path, need = write_rows(tmp_path / "d.jsonl", [row]), len(tokens)
    for skip in (False, True):  # Not all rows are dropped.
        with pytest.raises(ValueError, match=rf"d.jsonl:1: .* {need} tokens.*\(1\) with --skip"):
            read(path, kind, need - 1, skip_long=skip, **settings)
    write_rows(path, [row, {name: "long " * 100 for name in row}])
    assert len(read(path, kind, need, skip_long=True, **settings)) == 1
    noted = capsys.readouterr().out
    assert re.search("dropped rows .*, 1 in all, the first at .*d.jsonl:2\n", noted)


def test_minibatches_are_shuffled_epochs():
    """Every row once per epoch; the order follows from seed and step alone."""
    stream = [i for step in range(15) for i in minibatch(10, 4, step, seed=1)]
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    assert minibatch(10, 4, 7, seed=1) == stream[28:32] != minibatch(10, 4, 7, seed=2)
    assert sorted(minibatch(3, 6, 0, seed=0)) == [0, 0, 1, 1, 2, 2]  # more places than rows


def test_the_shipped_data_is_valid():
    """Every row can be read, and a demonstration has its answer."""
    kinds = {"facts": "training", "units": "training", "prior": "prior"}
    for name, kind in (kinds | {"facts_ood": "task", "units_test": "task"}).items():
        for row in read(ROOT / "data" / f"{name}.jsonl", kind, 4096):
            assert kind != "training" or contains(row["demonstration"], row["answer"])
