"""`plot`: pictures of a real bank, through the command line."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model

from peft_xmask import BottleneckConfig, ProfileBank, XPEFTConfig

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")


@pytest.fixture
def bank(tiny_bert, tmp_path):
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, num_profiles=4)
    model = get_peft_model(tiny_bert(), config)
    with torch.no_grad():
        model.masks("default").logits.weight.normal_(std=0.01)
    ProfileBank.from_model(model, ["ann", "bob", "Zoë", "$x_1$"]).save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.mark.parametrize(
    "arguments", [("masks",), ("masks", "--profile", "ann", "--profile", "$x_1$"), ("map",), ("usage",), ("bytes",)]
)
def test_each_picture_is_written(arguments, bank, cli, tmp_path):
    out = tmp_path / "picture.png"
    kind, *rest = arguments
    done = cli("plot", kind, bank, *rest, "--out", out)
    assert done.status == 0, done.err
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_map_is_coloured_by_a_column(bank, cli, tmp_path):
    values, out = tmp_path / "values.csv", tmp_path / "map.svg"
    values.write_text("name,age,genre\nann,31,drama\nZoë,40,crime\n", encoding="utf-8")
    assert cli("plot", "map", bank, "--values", values, "--column", "genre", "--out", out).status == 0
    assert "<!-- drama -->" in out.read_text()
    assert cli("plot", "map", bank, "--values", values, "--out", out).status == 0
    assert "<!-- age -->" in out.read_text()


def test_bytes_beside_peers(bank, minilm, tiny_bert, cli, tmp_path):
    out, peer = tmp_path / "bytes.svg", tmp_path / "small"
    get_peft_model(tiny_bert(), BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=4)).save_pretrained(peer)
    done = cli("plot", "bytes", bank, "--base", minilm, "--method", "LORA", "--method", peer, "--out", out)
    assert done.status == 0, done.err
    text = out.read_text()
    assert "<!-- LORA -->" in text
    assert "<!-- small -->" in text
    assert "<!-- 294,912 B" in text  # 6 blocks, query and value, r = 8, width 384, 4 bytes
    done = cli("plot", "bytes", bank, "--base", minilm, "--method", "SHADOW", "--out", out)
    assert (done.status, done.err.count("error:")) == (2, 1)


def test_mistakes_are_one_line(bank, cli, tmp_path):
    out = ("--out", tmp_path / "picture.png")
    values = tmp_path / "values.csv"
    values.write_text("name,age\nann,31\n")
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00")
    for arguments, words in (
        (("masks", tmp_path / "nowhere"), "neither a folder"),
        (("masks", bank, "--profile", "nobody"), "'nobody'"),
        (("map", bank, "--values", values, "--column", "genre"), "a column 'genre'"),
        (("map", bank, "--values", tmp_path / "bad.csv"), "CSV file in UTF-8"),
        (("bytes", bank, "--method", "LORA"), "--base"),
    ):
        done = cli("plot", *arguments, *out)
        assert (done.status, done.err.count("error:")) == (2, 1), done
        assert words in done.err
    assert cli("plot", "usage", bank, "--out", tmp_path / "picture.doc").status == 2


def test_the_command_line_starts_without_what_only_some_commands_need():
    code = "import sys, peft_xmask.cli; print(sorted({'matplotlib', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
