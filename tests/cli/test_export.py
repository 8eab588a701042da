"""``peft-xmask bank export``: stock LoRA folders of a bank's profiles."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_xmask import XPEFTConfig
from peft_xmask.cli.bank_sources import folder_of
from peft_xmask.profiles import ProfileBank

NAMES = ["ann", "../bob", "Zoë"]


def llama(**fields) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, **fields)).eval()


def made(folder, base, **fields) -> PeftModel:
    config = XPEFTConfig(
        task_type="CAUSAL_LM", num_adapters=12, bottleneck_size=4, activation="identity", num_profiles=3, scale=1.0,
        **fields,
    )  # fmt: skip
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model.masks("default").logits.weight.normal_(generator=torch.Generator().manual_seed(1))
    ProfileBank.from_model(model, NAMES).save_pretrained(folder)
    return model


@pytest.fixture
def model(tmp_path) -> PeftModel:
    llama().save_pretrained(tmp_path / "base")
    return made(tmp_path / "bank", llama(), insertion_form="parallel")


def test_plain_peft_reads_what_is_written(cli, model, tmp_path):
    command = ("bank", "export", tmp_path / "bank", "--out", tmp_path / "out", "--base", tmp_path / "base")
    done = cli(*command, "ann", "../bob")
    assert done.status == 0, done.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["..%2Fbob", "ann"]
    assert "rank" in done.out
    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    for row, name in enumerate(NAMES[:2]):
        served = PeftModel.from_pretrained(llama(), tmp_path / "out" / folder_of(name)).eval()
        model.set_profile(row)
        with torch.no_grad():
            torch.testing.assert_close(served(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_for_vllm_the_rank_is_one_of_its_own(cli, model, tmp_path):
    (tmp_path / "names").write_text("Zoë\n", encoding="utf-8")
    done = cli(
        "bank", "export", tmp_path / "bank", "--names", tmp_path / "names", "--out", tmp_path / "out",
        "--base", tmp_path / "base", "--vllm",
    )  # fmt: skip
    assert done.status == 0, done.err
    config = json.loads((tmp_path / "out" / folder_of("Zoë") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (8, 8, "LORA")


def test_what_vllm_refuses_is_refused(cli, tmp_path):
    llama(mlp_bias=True).save_pretrained(tmp_path / "base")
    made(tmp_path / "bank", llama(mlp_bias=True), insertion_form="sequential")
    command = ("bank", "export", tmp_path / "bank", "ann", "--out", tmp_path / "out", "--base", tmp_path / "base")
    done = cli(*command, "--vllm")
    assert done.status == 2
    assert "biases" in done.err
    assert not (tmp_path / "out").exists()
    assert cli(*command).status == 0


def test_mistakes_are_one_line(cli, model, tmp_path):
    command = ("bank", "export", tmp_path / "bank", "--out", tmp_path / "out", "--base", tmp_path / "base")
    for more, words in ((("ann", "dan"), "'dan'"), ((), "names of profiles")):
        done = cli(*command, *more)
        assert done.status == 2
        assert words in done.err
        assert not (tmp_path / "out").exists()
    assert cli(*command, "ann").status == 0
    assert "--replace" in cli(*command, "ann").err
    assert cli(*command, "ann", "--replace").status == 0


def test_folders_of_names_that_are_no_names_of_folders():
    names = [".", "..", "a/b", "a%2Fb", "x" * 1000, "x" * 999, "ann.b", "张伟"]
    folders = [folder_of(name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders[:2] == ["%2E", "%2E%2E"]
    assert all("/" not in each and len(each.encode()) <= 255 for each in folders)
