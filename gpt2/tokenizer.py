"""A model's own tokens, never others than it was trained with. What its folder has decides:

tokenizer.json             read by the tokenizers library, as in transformers
vocab.json and merges.txt  GPT-2's two files, read by tiktoken
none of them               GPT-2's own vocabulary, if the model has 50,257 tokens
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from model import GPT2_SIZES

FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
FILES += ("tokenizer_config.json", "special_tokens_map.json")
FILES += ("tokenizer.model", "spiece.model", "vocab.txt")  # of others, which are not read
# How GPT-2 splits a text into words before it merges bytes, and its letters for the bytes.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LETTERS = {chr(b): b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
LETTERS |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*LETTERS.values()}))}


@dataclass
class Tokenizer:
    """The end token in a text is plain text; other added tokens are themselves."""

    encode: Callable  # text to token ids
    decode_all: Callable  # token ids to text
    n_vocab: int
    eos_id: int
    folder: Path | None = None  # that it was read from

    def decode(self, tokens):
        """Text up to the end token, which is shown if it is alone: as one token of a response."""
        ends = len(tokens) > 1 and self.eos_id in tokens
        return self.decode_all(tokens[: tokens.index(self.eos_id)] if ends else tokens)


def load_tokenizer(name_or_folder, vocab_size):
    """Of a model whose vocabulary may be padded; a name in GPT2_SIZES means GPT-2's own."""
    folder = None if name_or_folder in GPT2_SIZES else Path(name_or_folder)
    found = {name for name in FILES if folder and (folder / name).is_file()}
    try:
        if "tokenizer.json" in found:
            tokenizer = of_tokenizer_json(folder)
        elif {"vocab.json", "merges.txt"} <= found:
            tokenizer = of_encoding(read_merges(folder), folder)
        elif found or vocab_size != 50257:
            raise ValueError(f"there is none for {vocab_size} tokens")
        else:
            tokenizer = of_encoding(tiktoken.get_encoding("gpt2"), folder)
        if tokenizer.n_vocab > vocab_size:
            raise ValueError(f"it has {tokenizer.n_vocab} tokens, the model {vocab_size}")
        tokenizer.folder = folder
        return tokenizer
    except ImportError:
        raise ValueError(f"{folder}/tokenizer.json needs: pip install tokenizers") from None
    except Exception as e:  # whatever a damaged file or no network makes the readers raise
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        remedy = "put its tokenizer.json, or vocab.json and merges.txt, beside the weights"
        if not found:
            remedy += ", or for GPT-2 connect to the network once or set TIKTOKEN_CACHE_DIR"
        raise ValueError(f"cannot read the tokenizer of --init_from ({reason}); {remedy}") from None


def read_json(path):
    """A file that need not be there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def end_token(folder, special):
    """The id of the base's own end token, one of the special tokens {text: id}.

    Other ids in config.json are transformers' default, which a small vocabulary does not have.
    """
    fields = {"generation_config.json": "eos_token_id", "config.json": "eos_token_id"}
    fields |= {"tokenizer_config.json": "eos_token", "special_tokens_map.json": "eos_token"}
    for name, field in fields.items() if folder else ():
        value = read_json(folder / name).get(field)
        value = value["content"] if isinstance(value, dict) else value
        values = value if isinstance(value, list) else [value]
        ids = {special.get(v, v) for v in values} & {*special.values()}
        if len(ids) > 1:
            raise ValueError(f"{name} has several end tokens; keep the one to learn")
        if ids:
            return ids.pop()
    if "<|endoftext|>" not in special:
        raise ValueError("no special token is the eos_token_id of config.json; write it there")
    return special["<|endoftext|>"]


def of_tokenizer_json(folder):
    import tokenizers  # optional: pip install tokenizers

    fields = read_json(folder / "tokenizer.json")
    eos_id = end_token(folder, {token["content"]: token["id"] for token in fields["added_tokens"]})
    for token in fields["added_tokens"]:  # What is special is encoded as plain text from here on.
        token["special"] = token["id"] == eos_id
    own = tokenizers.Tokenizer.from_str(json.dumps(fields))
    own.encode_special_tokens = True
    own.no_truncation()
    own.no_padding()
    utf_8 = lambda text: text.encode(errors="replace").decode()  # without lone surrogates
    encode = lambda text: own.encode(utf_8(text), add_special_tokens=False).ids
    decode = lambda tokens: own.decode(tokens, skip_special_tokens=False)
    return Tokenizer(encode, decode, max(own.get_vocab().values()) + 1, eos_id)


def read_merges(folder):
    vocab = read_json(folder / "vocab.json") | read_json(folder / "added_tokens.json")
    settings = read_json(folder / "tokenizer_config.json")
    if settings.get("add_prefix_space"):
        raise ValueError("add_prefix_space needs a tokenizer.json")
    added = settings.get("added_tokens_decoder", {})
    vocab |= {token["content"]: int(i) for i, token in added.items()}
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = ["".join(line.split()) for line in lines if line and not line.startswith("#version")]
    ranks = {bytes(LETTERS[c] for c in word): vocab[word] for word in [*LETTERS, *merges]}
    ids = [vocab[word] for word in merges]
    if ids != sorted(set(ids)):  # tiktoken merges in their order
        raise ValueError("the ids of vocab.json are not in the order of merges.txt")
    taken = {*ranks.values()}
    special = {word: i for word, i in vocab.items() if i not in taken}
    return tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def of_encoding(encoding, folder=None):
    special = {word: encoding.encode_single_token(word) for word in encoding.special_tokens_set}
    eos_id = end_token(folder, special)
    allowed = {word for word, i in special.items() if i != eos_id}
    words = {encoding.encode_single_token(word): word for word in encoding.token_byte_values()}
    words |= {i: word.encode() for word, i in special.items()}
    # An id that is none, of a padded vocabulary, cannot be in a text either.
    join = lambda tokens: b"".join(words.get(token, b"\xff") for token in tokens)
    encode = lambda text: encoding.encode(text, allowed_special=allowed, disallowed_special=())
    decode = lambda tokens: join(tokens).decode("utf-8", "backslashreplace")
    return Tokenizer(encode, decode, encoding.n_vocab, eos_id)
