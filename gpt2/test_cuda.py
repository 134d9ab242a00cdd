"""The GPU's script, as far as a CPU can tell; the equalities on a GPU are in test_fast.py."""

import json

import pytest

from gpt2 import bench, cuda, train


@pytest.mark.parametrize("step", [k for k, (_, text) in cuda.STEPS.items() if "gpt2." in text])
def test_programs_know_the_flags_of_their_steps(step):
    """And can print their help."""
    names = dict(device="cpu", init_from="FOLDER", out="OUT", gpus=2)
    words = cuda.STEPS[step][1].format(**names).split()
    program = next(word for word in words if word.startswith("gpt2."))
    parse = {"gpt2.train": train.parse_args, "gpt2.bench": bench.parse_args}[program]
    assert parse(words[words.index(program) + 1 :])
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])


def test_a_failed_step_and_an_endless_one_are_recorded(tmp_path, monkeypatch):
    steps = {"fails": (60, "-c exit(3)"), "endless": (0.5, "-c while(1):0")}
    monkeypatch.setattr(cuda, "STEPS", steps)
    monkeypatch.setattr(cuda, "copy_speed", lambda device: 1.0)
    out = tmp_path / "cuda.json"
    with pytest.raises(SystemExit, match="a step has failed"):
        cuda.main(["fails", "endless", "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())["steps"]
    assert [found[name]["status"] for name in steps] == [3, 124]
