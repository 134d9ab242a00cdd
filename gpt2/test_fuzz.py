"""gpt2/fuzz.py runs, and notices what does not end in order. CPU only, offline."""

import pytest

from gpt2 import fuzz, train


def test_a_few_damaged_runs_end_in_order(capsys):
    """One of each kind; the rest is for `python -m gpt2.fuzz`."""
    assert fuzz.main(["--cases", str(len(fuzz.KINDS)), "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {kind} | 1 |" in printed for kind in fuzz.KINDS) and "\n0 failed" in printed


@pytest.mark.parametrize(
    "end, word",
    [
        (KeyError("x"), "KeyError"),
        (SystemExit("no sentence"), "no sentence"),
        (SystemExit("error: one\nerror: two"), "two"),
        (SystemExit(1), "it says"),
    ],
)
def test_the_fuzz_script_notices_disorder(end, word, monkeypatch):
    """A traceback, no sentence, two of them, none at all."""

    def ends(argv):
        raise end

    monkeypatch.setattr(train, "main", ends)
    assert word in fuzz.run([], {})[1]
