"""Is a response in plain text correct? Two matches, an exact and a lenient one."""

import re


def normalise(text):
    """Lower case, single spaces, no full stop at the end: what an exact match may differ in."""
    return " ".join(text.lower().split()).rstrip(".")


def is_exact(response, answer):
    """The response is the answer, but for case, white space and a final full stop."""
    return normalise(response) == normalise(answer)


def words(text):
    """The words of a text in lower case, with a space before and after each."""
    return " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "


def contains(response, answer):
    """The answer's words stand in the response, whole and in order.

    An answer without any word, such as "!", must match exactly.
    """
    if not words(answer).strip():
        return is_exact(response, answer)
    return words(answer) in words(response)
