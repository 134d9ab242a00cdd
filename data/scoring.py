"""Is a response in plain text correct? Two matches, an exact and a lenient one, in any language."""

import re
import unicodedata

SAME = str.maketrans({"’": "'", **dict.fromkeys("‐‑‒–−－־", "-")})
UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR"}
INSIDE_NUMBER = re.compile(r"(?<=\d)(?:[,'’_\u00a0\u202f](?=\d{3}(?!\d))|\s+(?=[%‰°℃€₽¥₩](?!\d)))")
# In the letters of `shape`: a number has its sign and unit, a word what joins it, "C++" its "++".
SIGN, UNIT = r"(?:(?<![.)])[-$±√]*\.?(?=N))?", r"(?:(?<=N)[%‰°℃$]L*|\+\+|[+#](?![LMN]))?"
WORD = re.compile(rf"IM*|{SIGN}[LMN]+{UNIT}(?:(?:[-/_&^]|(?<=N)[.,:'](?=N))[$]?[LMN]+{UNIT})*")


def normalise(text):
    """One spelling, lower case, single spaces, no full stop: what an exact match may differ in."""
    text = "".join(c for c in text.casefold() if unicodedata.category(c) != "Cf")  # not to be seen
    text = "".join(str(unicodedata.decimal(c, c)) for c in text)  # digits of other scripts
    text = unicodedata.normalize("NFC", text).replace("i\u0307", "i").translate(SAME)  # Turkish İ
    return " ".join(text.split()).rstrip(".。।۔")


def is_exact(response, answer):
    return normalise(response) == normalise(answer)


def shape(c):
    """N of a number, M mark, I of a script without spaces, L another letter, $ currency, or c."""
    kind = unicodedata.category(c)
    if unicodedata.numeric(c, None) is not None:
        return "N"
    if kind[0] == "L" and unicodedata.name(c, "").split(" ")[0] in UNSPACED:
        return "I"
    if kind[0] in "LM":
        return kind[0]
    return "$" if kind == "Sc" else c


def words(text):
    """Numbers, without separators of thousands, and words, each with all that belongs to it."""
    text = normalise(INSIDE_NUMBER.sub("", text))
    return " ".join(text[slice(*m.span())] for m in WORD.finditer("".join(map(shape, text))))


def contains(response, answer):
    """The answer's words stand in the response, whole and in order; without any, `is_exact`."""
    # "ice-cream" is "ice cream", but "five" is not in "twenty-five".
    wanted = re.sub(r"\\[- ]", "[- ]", re.escape(words(answer)))
    found = re.search(f" {wanted} ", f" {words(response)} ")
    return found is not None if wanted else is_exact(response, answer)
