"""What gpt2/data.py guarantees about tokens, rows, templates and minibatches."""

import json
import random
import re

import pytest
import tiktoken

from data.scoring import contains
from gpt2 import data as data_file
from gpt2.conftest import BYTES, EOS, ROOT, error_of, flags, write_rows, write_vocabulary
from gpt2.data import TEMPLATES, RowReader, batches, load_encoding, minibatch, pad_right
from sdft import teacher_context

ROW = {"prompt": "Where?\n", "demonstration": "In the hat.", "article": "A hat.", "answer": "hat"}


def read(path, kind="training", block_size=320, max_new_tokens=8, **settings):
    reader = RowReader(BYTES, block_size, max_new_tokens, **settings)
    return reader.read(path, getattr(reader, kind))


def teacher_text(path, **settings):
    return [BYTES.decode(row["teacher_ids"]) for row in read(path, **settings)]


# --- Tokens ---------------------------------------------------------------------------------------


def test_a_folders_vocabulary_encodes_like_gpt2(tmp_path):
    """Against GPT-2's published word pattern; a file that changes is read again."""
    oracle, enc = write_vocabulary(tmp_path), load_encoding(tmp_path)
    texts = "the man in the hat", "  It's 3.14 or 22\n\n\tnaïve 日本語 🙂 ", "<|endoftext|>"
    for text in texts:
        assert enc.encode_ordinary(text) == oracle.encode_ordinary(text)
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert enc.eot_token == EOS and len(enc.encode_ordinary(" the")) == 1
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    with pytest.raises(ValueError, match="vocab.json.* damaged"):
        load_encoding(tmp_path)


def test_words_are_split_as_gpt2_splits_them(tmp_path):
    """A space belongs to the word, number or sign after it: with a merge " 2" it is one token."""
    write_vocabulary(tmp_path)
    merges, vocab = tmp_path / "merges.txt", json.loads((tmp_path / "vocab.json").read_text())
    merges.write_text(merges.read_text() + "Ġ 2\nĠ !\n")
    del vocab["<|endoftext|>"]
    vocab |= {"Ġ2": len(vocab), "Ġ!": len(vocab) + 1, "<|endoftext|>": len(vocab) + 2}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    enc = load_encoding(tmp_path)
    parts = [enc.decode([token]) for token in enc.encode_ordinary("an 2 ! the")]
    assert parts == ["an", " 2", " !", " the"]


@pytest.mark.parametrize("eos", ["262", -1, 0, 5, 261, 263, 755, 262.0, True, None, [262], {}])
def test_the_end_token_must_be_the_last(eos, tmp_path):
    """With another number no response would end, or each with its first token."""
    write_vocabulary(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text()) | {"<|endoftext|>": eos}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=r"vocab.json: .*endoftext.* must be the last one, 262"):
        load_encoding(tmp_path)


def test_without_network_the_cache_folder_is_named(monkeypatch):
    """tiktoken's own error does not tell what to do."""

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="network.*TIKTOKEN_CACHE_DIR"):
        load_encoding(None)


def test_special_tokens_in_data_are_text(tmp_path):
    """Nobody's data ends a response; the end after a demonstration is learned once."""
    row = {"prompt": "a<|endoftext|>b\n", "demonstration": "c<|endoftext|>"}
    (out,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert out["demonstration_ids"].count(256) == 1 and out["demonstration_ids"][-1] == 256
    assert 256 not in out["prompt_ids"] + out["teacher_ids"]
    assert BYTES.decode(out["prompt_ids"]) == row["prompt"]
    assert BYTES.decode(out["demonstration_ids"][:-1]) == row["demonstration"]
    _, mask = pad_right([out["demonstration_ids"], [1]], 256, "cpu")
    assert mask.sum(1).tolist() == [len(out["demonstration_ids"]), 1]


def test_decoding_stops_at_the_end_token():
    """And an id beyond the encoding, as in padded vocabularies, becomes U+FFFD."""
    assert data_file.decode(BYTES, [72, 105, 300, 256, 72]) == "Hi\ufffd"


# --- What the teacher reads -----------------------------------------------------------------------


def test_the_teacher_reads_what_its_flag_names(tmp_path):
    """--teacher_reads; the student never reads more than the prompt."""
    path = write_rows(tmp_path / "d.jsonl", [ROW])
    template = teacher_context("Where?\n", "In the hat.")
    expected = {"article": "A hat.\n\nWhere?\n", "demonstration": template}
    expected["both"] = "A hat.\n\n" + template
    for name, text in expected.items():
        assert teacher_text(path, template=TEMPLATES[name]) == [text]
        (row,) = read(path, template=TEMPLATES[name])
        assert BYTES.decode(row["prompt_ids"]) == "Where?\n"
    assert teacher_text(path) == [expected["both"]]  # the default


@pytest.mark.parametrize(
    "reads, missing, required",
    [
        ("article", "article", True),
        ("article", "demonstration", False),
        ("demonstration", "demonstration", True),
        ("demonstration", "article", False),
        ("both", "demonstration", True),
        ("both", "article", False),
    ],
)
def test_a_row_needs_what_the_teacher_reads(reads, missing, required, tmp_path):
    """Otherwise the teacher would silently read less; only `both` does without an article."""
    rows = [ROW, {name: text for name, text in ROW.items() if name != missing}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    if required:
        with pytest.raises(ValueError, match=f"d.jsonl:2: {missing} is missing"):
            read(path, template=TEMPLATES[reads])
    else:
        assert len(read(path, template=TEMPLATES[reads])) == 2
    if missing == "demonstration":
        with pytest.raises(ValueError, match="d.jsonl:2: demonstration is missing"):
            read(path, template=TEMPLATES[reads], imitates=True)  # SFT


def test_a_template_file_is_taken_as_it_stands(tmp_path):
    """Braces in it or in the data are text; a placeholder may come twice."""
    row = ROW | {"demonstration": "{prompt} {x}"}
    path, file = write_rows(tmp_path / "d.jsonl", [row]), tmp_path / "t.txt"
    file.write_text("{article}|{prompt}|{demonstration}|{prompt}{ }{}")
    text = "A hat.|Where?\n|{prompt} {x}|Where?\n{ }{}"
    assert teacher_text(path, template=data_file.read_template(file, {})) == [text]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{prompt} {demo}", r"t.txt: unknown placeholder \{demo\}; use \{prompt\}, "),
        (b"{demonstration}", r"t.txt: a template needs \{prompt\}"),
        (b"{prompt} {prompt}", r"t.txt: a template needs \{prompt\}, and \{demonstration\}"),
        (b"", r"t.txt: a template needs"),
        (b"{prompt} {article} \xff", "t.txt: byte 19 is not UTF-8"),
    ],
)
def test_a_wrong_template_is_named(content, message, tmp_path):
    """Exactly: a mistyped placeholder would otherwise be read by the teacher as text."""
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data_file.read_template(tmp_path / "t.txt", {})


# --- Rows -----------------------------------------------------------------------------------------


def bad_lines():
    """(bytes of a line, a word of the message)."""
    r, line = random.Random(0), json.dumps(ROW).encode()
    for _ in range(40):
        yield line[: r.randint(1, len(line) - 1)], "not JSON"
    for _ in range(20):
        at = r.randint(0, len(line))
        yield line[:at] + bytes([r.choice([0x80, 0xC0, 0xFE, 0xFF])]) + line[at:], "UTF-8"
    for field in ROW:
        for value in (7, 1.5, True, [], ["a"], {}, {"a": 1}):
            yield json.dumps(ROW | {field: value}).encode(), f"{field} "
        for value in ("", " ", "\n"):
            yield json.dumps(ROW | {field: value}).encode(), "empty"
        yield json.dumps(ROW | {field: "half \ud83d pair"}).encode(), "surrogate"
    for field in ("prompt", "demonstration"):
        yield json.dumps(ROW | {field: None}).encode(), "missing"
        yield json.dumps({k: v for k, v in ROW.items() if k != field}).encode(), "missing"
    for value in (b"7", b"null", b"true", b'"text"', b"[]", b"[{}]", b"NaN", b"1e999"):
        yield value, "object"
    for value in (b"{", b"}", b"{}{}", b"{'prompt': 1}", b"[" * 100_000, b"9" * 5000, b"\x00"):
        yield value, "JSON"
    yield b"\xef\xbb\xbf" + line, "JSON"
    yield line[:-1] + b', "prompt": "again"}', "'prompt' stands twice"
    for alias in ("privileged_context", "context"):
        yield json.dumps(ROW | {alias: "twice"}).encode(), "same field"
    for field in ("prompt", "demonstration", "article"):
        yield json.dumps(ROW | {field: "long " * 200}).encode(), "n_positions"


def test_every_bad_line_is_named_by_number(tmp_path):
    """File, line and what is wrong, for some 130 of them."""
    line, path, cases = json.dumps(ROW).encode(), tmp_path / "bad.jsonl", list(bad_lines())
    assert len(cases) > 120
    for bad, word in cases:
        path.write_bytes(line + b"\n" + bad + b"\n" + line)
        with pytest.raises(ValueError) as error:
            read(path)
        message = str(error.value)
        assert f"{path}:2: " in message and word in message, (bad, message)
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--data", "--test", "--ood", "--eval"])
def test_a_bad_line_stops_the_run_before_it_starts(flag, tmp_path, base, data):
    """Every set is checked, and nothing is written."""
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "answer": 3}])
    argv = flags(base, data, tmp_path / "out", flag, tmp_path / "bad.jsonl")
    assert "bad.jsonl:1: answer must be text" in error_of(*argv)
    assert not (tmp_path / "out").exists()


def test_aliases_are_read_and_unused_fields_noted(tmp_path):
    """TRL's privileged_context, an earlier context; a byte order mark; a mistyped answer."""
    row = {"prompt": "Q\n", "privileged_context": "D", "context": "A", "anwser": "D"}
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode())
    reader = RowReader(BYTES, 320, 8)
    (out,) = reader.read(path, reader.training)
    assert BYTES.decode(out["teacher_ids"]) == "A\n\n" + teacher_context("Q\n", "D")
    assert re.search(r"not used, 1 in all, first 'anwser' \(.*d.jsonl:1\)", reader.notes[0])


def test_prompts_that_touch_their_response_are_noted(tmp_path):
    """A response follows its prompt as it stands: "Q:" and "A" would become "Q:A"."""
    demonstrations = ["A", " A", "A"]
    rows = [{"prompt": p, "demonstration": d} for p, d in zip(["Q:", "Q:", "Q:\n"], demonstrations)]
    reader = RowReader(BYTES, 320, 8)
    reader.read(write_rows(tmp_path / "d.jsonl", rows), reader.training)
    assert "in 1 rows, first at" in reader.notes[0] and "d.jsonl:1" in reader.notes[0]


@pytest.mark.parametrize("kind", ["training", "sft", "task", "prior text", "prior answer"])
def test_a_row_may_fill_the_block_exactly(kind, tmp_path):
    """One token less of block_size is an error, or the row is dropped and counted."""
    row, settings = ROW, dict(max_new_tokens=8)
    need = {  # tokens of one byte each
        "training": len("A hat.\n\n" + teacher_context("Where?\n", "In the hat.")) + 8,
        "sft": len("A hat.\n\nWhere?\n") + 8,
        "task": len("Where?\n") + 8,
        "prior text": len("some text"),
        "prior answer": len("Where?\n" + "hat"),
    }[kind]
    if kind == "sft":  # a short article and a long demonstration
        row = ROW | {"demonstration": "long " * 9}
        settings |= dict(imitates=True, template=TEMPLATES["article"])
        need = len("Where?\n" + "long " * 9) + 1  # with the end token
    if kind == "prior text":
        row = {"text": "some text"}
    path, method = write_rows(tmp_path / "d.jsonl", [row]), kind.split()[0]
    settings |= dict(kind="training" if method == "sft" else method)
    assert len(read(path, block_size=need, **settings)) == 1
    with pytest.raises(ValueError, match=rf"d.jsonl:1: .* {need} tokens.*\(1\) with --skip_long"):
        read(path, block_size=need - 1, **settings)
    reader = RowReader(BYTES, 320, 8, skip_long=True)
    write_rows(path, [ROW, ROW | {"prompt": "long " * 100}])
    assert len(reader.read(path, reader.training)) == 1
    assert "dropped 1 of 2 rows" in reader.notes[0]


@pytest.mark.parametrize("blank", [" ", "\t", "\n", "\u3000"])
def test_a_million_blanks_are_too_long(blank, tmp_path):
    """tiktoken would panic, with a traceback that no except clause for Exception catches."""
    write_vocabulary(tmp_path)
    reader = RowReader(load_encoding(tmp_path), 320, 8)
    rows = [ROW | {field: blank * 10**6 + "x"} for field in ("prompt", "demonstration", "article")]
    path = write_rows(tmp_path / "d.jsonl", [ROW, *rows])
    with pytest.raises(ValueError, match="d.jsonl:2: .*n_positions=320"):
        reader.read(path, reader.training)
    reader.skip_long = True
    assert len(reader.read(path, reader.training)) == 1


# --- Batches --------------------------------------------------------------------------------------


def test_minibatches_are_shuffled_epochs():
    """Every row once per epoch; the order follows from seed and step alone."""
    stream = [i for step in range(15) for i in minibatch(10, 4, step, seed=1)]
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    assert minibatch(10, 4, 7, seed=1) == stream[28:32] != minibatch(10, 4, 7, seed=2)
    assert sorted(minibatch(3, 6, 0, seed=0)) == [0, 0, 1, 1, 2, 2]  # more places than rows


def test_batches_split_what_does_not_fit_together():
    """A long prompt beside a long completion; nothing is lost or reordered."""
    r = random.Random(0)
    pairs = [([1] * n, [2] * r.randint(1, 20 - n)) for n in (r.randint(1, 19) for _ in range(50))]
    parts = list(batches(pairs, 8, 20))
    assert [p for prompts, completions in parts for p in zip(prompts, completions)] == pairs
    for prompts, completions in parts:
        assert len(prompts) <= 8 and max(map(len, prompts)) + max(map(len, completions)) <= 20


def test_the_shipped_data_is_valid():
    """Every fact can be learned from its article, and no test question is trained on."""

    def load(name, kind):
        return read(ROOT / "data" / f"{name}.jsonl", kind, block_size=4096, max_new_tokens=64)

    facts, units, prior = (
        load("facts", "training"),
        load("units", "training"),
        load("prior", "prior"),
    )
    assert len(facts) == len(units) == 24
    assert [sum(key in r for r in prior) for key in ("answer_ids", "text_ids")] == [24, 8]
    for line in (ROOT / "data" / "facts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert all(contains(row[k], row["answer"]) for k in ("demonstration", "article")), row
    for row in units:
        minutes = int(re.search(r"\d+", row["prompt"])[0])
        h, m = map(int, re.findall(r"\d+", row["answer"]))
        assert minutes == 60 * h + m
    tests = load("facts_ood", "task") + load("units_test", "task")
    assert not {r["prompt"] for r in facts + units} & {r["prompt"] for r in tests}
