"""cards, describe and compare on the command line."""

import json

import pytest


def test_all_cards_in_a_table(cli):
    done = cli("cards")
    assert done.status == 0
    assert "LORA" in done.out
    assert "XPEFT" in done.out
    assert len(json.loads(cli("cards", "--json").out)) >= 48


def test_one_card_in_full(cli):
    facts = json.loads(cli("cards", "ia3", "--json").out)[0]
    assert facts["integration form"] == "rescaling"
    assert facts["trainable parameters"] == "d_in*feedforward + d_out*(1 - feedforward) per site"
    shown = cli("cards", "xpeft").out
    assert "Why" in shown
    assert "gated addition" in shown


def test_an_unknown_method_is_one_line(cli):
    done = cli("cards", "NOPE")
    assert done.status == 2
    assert done.err.count("error:") == 1


@pytest.mark.parametrize("method", ["xpeft", "bottleneck", "lora"])
def test_describe_says_what_a_trained_adapter_is(method, adapters, minilm, cli):
    facts = json.loads(cli("describe", adapters[method], "--base", minilm, "--json").out)
    assert facts["method"] == {"xpeft": "XPEFT", "bottleneck": "BOTTLENECK_ADAPTER", "lora": "LORA"}[method]
    assert facts["blocks touched"] == "6 of 6"
    assert f"{facts['trainable parameters']} = " in facts["by formula"]
    assert f"{facts['bytes stored']} = " in facts["bytes by formula"]


def test_compare_writes_every_kind_of_file(minilm, adapters, cli, tmp_path):
    files = [tmp_path / f"result.{ending}" for ending in ("md", "csv", "html", "png")]
    outs = [argument for path in files for argument in ("--out", path)]
    given = ("LORA", "ROAD", "C3A", "--set", "ROAD.group_size=32", "--repeats", 1)
    done = cli("compare", "--base", minilm, *given, *outs)
    assert done.status == 0, done.err
    assert "C3A" in done.out  # with the reason: its block size does not divide 384
    assert all(path.stat().st_size > 300 for path in files)
    assert "<table>" in files[2].read_text()


def test_compare_takes_adapter_folders(minilm, adapters, cli):
    done = cli("compare", "--base", minilm, adapters["bottleneck"], "--repeats", 1, "--task", "SEQ_CLS", "--json")
    rows = json.loads(done.out)
    assert [row["name"] for row in rows] == ["base", "bottleneck"]


@pytest.mark.parametrize(
    "arguments",
    [("LORA", "--out", "result.doc"), ("LORA", "--set", "r=3"), ("NOPE",), ("LORA", "--task", "NOPE")],
)
def test_compare_refuses_before_it_measures(arguments, minilm, cli):
    done = cli("compare", "--base", minilm, *arguments)
    assert done.status == 2
    assert done.err.count("error:") == 1
