"""`demo` runs whole, in a process of its own, and its bank comes back the same."""

import re

from peft_xmask.cli.demo import film_table, verdict


def test_a_short_demo(cli_process, minilm, tmp_path):
    done = cli_process("demo", "--people", 4, "--epochs", 0.5, "--out", tmp_path / "kept")
    assert done.status == 0, done.err
    for name in ("common part", "+ offset", "mean absolute error"):
        assert name in done.out
    assert re.search(r"\d+ answers compared, all equal", done.out)
    assert (tmp_path / "kept" / "bank" / "adapter_config.json").is_file()
    assert (tmp_path / "kept" / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_data_inside_the_package_are_small_and_licensed(tmp_path):
    from importlib import resources

    folder = resources.files("peft_xmask.people").joinpath("data")
    assert sum(len(each.read_bytes()) for each in folder.iterdir()) < 400_000
    assert "MIT License" in folder.joinpath("LICENSE-films.txt").read_text()
    table = film_table(tmp_path, 60)
    assert len(table.people) == 60
    assert all(0 <= float(example.label) <= 10 for part in table.parts.values() for example in part)


def test_the_verdict_is_computed_from_the_numbers():
    assert verdict(-0.1, None).startswith("Nothing personal helped")
    assert "smaller by 0.125 of a rating point. Offsets did it" in verdict(0.125, None)
    assert verdict(0.125, 0.0012).endswith("Masks bring 0.001 of it, offsets the rest.")
