"""What seeds.py guarantees: runs that differ in the seed alone, summarised as they are."""

import json

import pytest

from experiments import seeds


def toy_run(folder, seed, x_at_the_end=0.75, lr=1e-4):
    """A finished run: the base at 0.5, each skill at 1 after its own stage, X falling in steps."""
    folder.mkdir()
    row = dict(X=0.5, Y=0.5, Z=0.5, prior=1.0)
    stages = [{"after": "X"} | row | dict(X=1.0), {"after": "Y"} | row | dict(X=0.9, Y=1.0)]
    stages += [{"after": "Z"} | row | dict(X=x_at_the_end, Y=0.5, Z=1.0, prior=0.25)]
    config = dict(seed=seed, out_dir=str(folder), lr=lr)
    results = {"config": config, "base": row, "sft": stages, "sdft": stages}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_table_has_means_worst_runs_and_papers_unit(tmp_path):
    """X ends at .75 and .85: kept (.75 - .5) / (1 - .5) = .5 and .7."""
    runs = [toy_run(tmp_path / "a", 0, 0.75), toy_run(tmp_path / "b", 1, 0.85)]
    lines = seeds.table(seeds.read(runs)).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines}
    cells = {name: [cell.strip() for cell in row] for name, row in cells.items()}
    assert cells["X, own"] == ["0.50 ± 0.00", "1.00 ± 0.00", "1.00 ± 0.00", "1.00", "1.00"]
    assert cells["X at the end"][1:] == ["0.80 ± 0.07", "0.80 ± 0.07", "0.75", "0.75"]
    assert cells["X kept"] == ["", "0.60 ± 0.14", "0.60 ± 0.14", "0.50", "0.50"]
    assert cells["Y kept"][1:] == ["0.00 ± 0.00", "0.00 ± 0.00", "0.00", "0.00"]
    assert cells["prior at the end"][2] == "0.25 ± 0.00"


def test_runs_of_other_settings_are_not_averaged(tmp_path):
    """Nor is a folder without results taken for a run."""
    runs = [toy_run(tmp_path / "a", 0), toy_run(tmp_path / "b", 1, lr=1e-3)]
    with pytest.raises(ValueError, match="differ in more than the seed"):
        seeds.read(runs)
    with pytest.raises(SystemExit, match="error: .*holds no results.json"):
        seeds.main([str(tmp_path)])


def test_figure_is_written(tmp_path, capsys):
    """Two panels with error bars, as a PNG."""
    pytest.importorskip("matplotlib")
    runs = [toy_run(tmp_path / "a", 0), toy_run(tmp_path / "b", 1)]
    seeds.main([*map(str, runs), f"--figure={tmp_path / 'toy.png'}"])
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert "X kept" in capsys.readouterr().out
