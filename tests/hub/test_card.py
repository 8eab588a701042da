"""The card on the Hub: others copy its Python block and run it."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

BLOCK = re.compile(r"^```python\n(import peft_xmask\n.*?)^```", re.MULTILINE | re.DOTALL)
RUN = """
import sys, torch
{block}
from safetensors.torch import save_file
batch = {{"input_ids": torch.arange(1, 21).reshape(4, 5), "attention_mask": torch.ones(4, 5).long()}}
with torch.no_grad():
    save_file({{"logits": model.eval()(**batch).logits}}, sys.argv[1])
"""
BASE = "sentence-transformers/all-MiniLM-L6-v2"


def card(hub, name: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.repos[name].files(revision)["README.md"].decode())


@pytest.mark.parametrize(("name", "id"), [("xpeft", "ann/xpeft"), ("over a pool in a subfolder", "ann/over-subfolder")])
def test_the_block_of_the_card_loads_the_adapter(name, id, hub, pushed, online, client, tmp_path):
    text = card(hub, id).text
    assert text.startswith("\n```python\nimport peft_xmask\n")
    script = tmp_path / "card.py"
    script.write_text(RUN.format(block=BLOCK.search(text).group(1)))
    client(script, tmp_path / "out.safetensors", home=online.home, offline=True)
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(pushed / "expected.safetensors")
    assert torch.equal(found["logits"], expected[name])


def test_the_card_states_base_pool_and_metadata(hub, pushed):
    found = card(hub, "ann/over-branch")
    assert found.data.library_name == "peft"
    assert found.data.base_model == BASE
    assert "x-peft" in found.data.tags
    assert f"| base model | `{BASE}` |" in found.text
    assert "| pool | `ann/pool@larger` |" in found.text
    assert "| pool, once for all profiles | not known |" not in found.text
    assert "More Information Needed" not in str(found)


def test_a_card_edited_on_the_hub_keeps_the_edits_at_the_next_push(hub, pushed, client, tmp_path):
    """As transformers does it: the card of the repository comes back with the push."""
    repo = hub.repos["ann/bottleneck"]
    text = repo.files("main")["README.md"].decode() + "\n## Results\n\nGood ones.\n"
    repo.commit("main", repo.files("main") | {"README.md": text.replace("| 4 |", "| 400 |").encode()})
    script = tmp_path / "again.py"
    script.write_text(
        "import client\nclient.adapted(client.bottleneck()).push_to_hub('ann/bottleneck')\n"
        "client.adapted(client.bottleneck()).push_to_hub('ann/bottleneck')\n"
    )
    client(script, home=tmp_path, token="token-of-ann")
    assert repo.files("main")["README.md"].decode() == text
