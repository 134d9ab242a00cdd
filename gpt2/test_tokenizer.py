"""What gpt2/tokenizer.py guarantees: a model's own ids and its own end token. CPU only, offline."""

import json
import sys

import pytest

from gpt2.conftest import BYTES, EOS, write_vocabulary
from gpt2.tokenizer import load_tokenizer, read_json

END, USER = "<|endoftext|>", "<|user|>"
TEXTS = ["the man in the hat", f"{USER} the zzz man{USER}\n"]
TEXTS += ["  It's 3.14 or 22\n\n\tnaïve 日本語 🙂 !\u3000x", "they'll 'LL don't\r\n ''s Ⅻ² _a_"]


def write(folder, files):
    """JSON or text over the files of a folder; None is a file that goes."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).unlink() if content is None else (folder / name).write_text(text)


@pytest.mark.parametrize("retrained", [False, True], ids=["its own", "retrained"])
@pytest.mark.parametrize("added", [[], [USER, "zzz"]], ids=["plain", "added"])
@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_a_folder_encodes_as_in_transformers(kind, added, retrained, tmp_path):
    """Its ids and its end token, 0 if retrained; but an end token in a text is plain text."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(write_vocabulary(tmp_path))
    if retrained:
        theirs = theirs.train_new_from_iterator([" ".join(TEXTS) * 9], 263)
    theirs.add_tokens(added[:1], special_tokens=True)
    theirs.add_tokens(added[1:])
    (tmp_path / "vocab.json").unlink()
    if kind == "tokenizer.json":
        theirs.backend_tokenizer.enable_truncation(2)  # which a folder may ask for
        theirs.backend_tokenizer.enable_padding(length=99)
        theirs.save_pretrained(tmp_path)
    else:  # and merges.txt, as transformers 4 saves them, or Windows
        theirs.backend_tokenizer.model.save(str(tmp_path))
        merges = (tmp_path / "merges.txt").read_bytes()
        (tmp_path / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n") + b"\r\n")
        write(tmp_path, {"added_tokens.json": theirs.get_added_vocab()})
    ours = load_tokenizer(tmp_path, 320)  # a padded vocabulary
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours.eos_id == theirs.eos_token_id == (0 if retrained else EOS)
    assert ours.n_vocab == len(theirs) and len(ours.encode(" the")) < len(ours.encode("\udcff 14"))
    for text in [*TEXTS, END]:
        assert ours.decode(ours.encode(text)) == text and ours.eos_id not in ours.encode(text)


CONFIG, SETTINGS, SPECIAL = "config.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED = {"262": {"content": END}, "265": {"content": "<s>"}}
ENDS = [  # files in the folder beside the vocabulary; the end token of three that are possible
    ({}, EOS),
    ({CONFIG: {"eos_token_id": 264}}, 264),
    ({CONFIG: {"eos_token_id": 7}, SETTINGS: {"eos_token": USER}}, 263),  # 7 is another word here
    ({CONFIG: {"eos_token_id": EOS}, "generation_config.json": {"eos_token_id": [263]}}, 263),
    ({SPECIAL: {"eos_token": {"content": USER}}}, 263),
    ({SETTINGS: {"eos_token": "<s>", "added_tokens_decoder": ADDED}}, 265),
]


@pytest.mark.parametrize("written, expected", ENDS)
def test_the_end_token_is_the_bases_own(written, expected, tmp_path):
    write_vocabulary(tmp_path)
    write(tmp_path, written | {"added_tokens.json": {USER: 263, "<|end|>": 264}})
    assert load_tokenizer(tmp_path, 320).eos_id == expected


MANY = {"eos_token_id": [262, 0, 263]}
WRONG = [  # what is written over the files of a vocabulary; tokens of the model; words of the error
    ({}, 262, "it has 263 tokens, the model 262"),
    ({"vocab.json": None}, 50257, "none for 50257 tokens); put its tokenizer.json"),
    ({SETTINGS: {"add_prefix_space": True}}, 263, "needs a tokenizer.json"),
    ({"vocab.json": '{"a": '}, 263, "JSONDecodeError"),
    ({"merges.txt": "Ġ th\nt h"}, 263, "not in the order of merges.txt"),
    ({CONFIG: MANY, "added_tokens.json": {END: 262, USER: 263}}, 320, "several end tokens"),
    ({"added_tokens.json": {USER: 262}}, 320, "no special token is the"),
    ({"tokenizer.json": {}}, 320, "tokenizer.json needs: pip install tokenizers"),
]


@pytest.mark.parametrize("written, vocab_size, words", WRONG)
def test_other_ids_are_never_used(written, vocab_size, words, tmp_path, monkeypatch):
    """One sentence, with the remedy, for files that are missing, damaged or of another model."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    vocab = read_json(write_vocabulary(tmp_path) / "vocab.json")
    write(tmp_path, {"vocab.json": {text: i for text, i in vocab.items() if text != END}})
    write(tmp_path, {"added_tokens.json": {END: EOS}} | written)
    with pytest.raises(ValueError, match="tokenizer") as error:
        load_tokenizer(tmp_path, vocab_size)
    assert words in str(error.value)


def test_decoding_stops_at_the_end_token():
    """And an id beyond the encoding, as in padded vocabularies, is not a text's."""
    texts = {(72, 105, 300, 256, 72): "Hi\\xff", (72, 256): "H", (256,): END, (256, 256): ""}
    assert {tokens: BYTES.decode([*tokens]) for tokens in texts} == texts
