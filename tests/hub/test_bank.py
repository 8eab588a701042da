"""A bank on the Hub: pushed twice, opened by id, and offline from the cache."""

import pytest

PUSH = """
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification
from peft_xmask import ProfileBank, XPEFTConfig
base = AutoModelForSequenceClassification.from_pretrained("{base}")
torch.manual_seed(1)
config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=12, bottleneck_size=4, num_profiles=3)
model = get_peft_model(base, config)
with torch.no_grad():
    model.masks("default").logits.weight.normal_(std=0.01)
bank = ProfileBank.from_model(model, ["ann", "bob", "carol"])
assert bank["ann"] != bank["bob"] != bank["carol"]
print(bank.push_to_hub("ann/bank"))
bank.remove("bob")
bank.push_to_hub("ann/bank", revision="smaller")
bank.push_to_hub("ann/bank", private=True)
bank.remove("ann")
bank.push_to_hub("ann/bank")
"""

OPEN = """
import torch
from transformers import AutoModelForSequenceClassification
from peft import PeftModel
from peft_xmask import ProfileBank
base = lambda: AutoModelForSequenceClassification.from_pretrained("{base}").eval()
for options in ({{}}, {{"revision": "smaller"}}):
    print(list(ProfileBank.from_pretrained("ann/bank", **options)))
batch = {{"input_ids": torch.arange(1, 11).reshape(2, 5)}}
served = ProfileBank.from_pretrained("ann/bank").attach(base())
loaded = PeftModel.from_pretrained(base(), "ann/bank").eval()
with torch.no_grad():
    by_name = served(**batch, adapter_names=["carol", "carol"]).logits
    print(torch.allclose(by_name, loaded(**batch).logits))
"""

PUSH_WITH_POOL = """
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification
from peft_xmask import AdapterPool, BottleneckConfig, ProfileBank, XPEFTConfig
base = lambda: AutoModelForSequenceClassification.from_pretrained("{base}")
torch.manual_seed(1)
common = get_peft_model(base(), BottleneckConfig(bottleneck_size=4, use_bias=False, init_weights=False))
pool = AdapterPool.random(12, 4, 0).with_common(common)
model = get_peft_model(base(), XPEFTConfig(task_type="SEQ_CLS", pool=pool, num_profiles=2))
ProfileBank.from_model(model, ["ann", "bob"]).save_pretrained("bank", with_pool=True)
for _ in range(2):
    ProfileBank.from_pretrained("bank").push_to_hub("ann/whole-bank")
print(pool.fingerprint)
"""

OPEN_WITH_POOL = """
import torch
from transformers import AutoModelForSequenceClassification
from peft import PeftModel
from peft_xmask import ProfileBank
base = lambda: AutoModelForSequenceClassification.from_pretrained("{base}").eval()
batch = {{"input_ids": torch.arange(1, 11).reshape(2, 5)}}
served = ProfileBank.from_pretrained("ann/whole-bank").attach(base())
loaded = PeftModel.from_pretrained(base(), "ann/whole-bank").eval()
loaded.set_profile(1)
with torch.no_grad():
    by_name = served(**batch, adapter_names=["bob", "bob"]).logits
    print(torch.allclose(by_name, loaded(**batch).logits))
"""

STRANGER = """
from peft_xmask import ProfileBank
from peft_xmask.errors import ConfigError
try:
    ProfileBank.from_pretrained("ann/nothing")
except ConfigError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    texts = {
        "push": PUSH, "open": OPEN, "push_with_pool": PUSH_WITH_POOL, "open_with_pool": OPEN_WITH_POOL,
        "stranger": STRANGER,
    }  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text.format(base="sentence-transformers/all-MiniLM-L6-v2"))
    return folder


def test_a_bank_travels_by_the_hub(hub, client, scripts, tmp_path):
    assert "ann/bank" in client(scripts / "push.py", home=tmp_path, token="token-of-ann")
    files = hub.repos["ann/bank"].files("main")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(files)
    assert not any(name.startswith(("profiles-", ".bank")) for name in files)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    expected = "['carol']\n['ann', 'carol']\nTrue\n"
    assert client(scripts / "open.py", home=fresh, token="token-of-ann").endswith(expected)
    assert client(scripts / "open.py", home=fresh, offline=True).endswith(expected)
    said = client(scripts / "stranger.py", home=fresh, token="token-of-ann")
    assert "'ann/nothing' is neither a folder here nor a Hub repository that can be reached" in said


def test_a_pool_beside_a_bank_travels_with_it(hub, client, scripts, tmp_path):
    """Its pool has a common part, which is stored nowhere else."""
    fingerprint = client(scripts / "push_with_pool.py", home=tmp_path, token="token-of-ann").split()[-1]
    files = set(hub.repos["ann/whole-bank"].files("main"))
    assert {f"pool-{fingerprint}/pool.json", f"pool-{fingerprint}/pool.safetensors"} < files
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert client(scripts / "open_with_pool.py", home=fresh, token="token-of-ann").endswith("True\n")
    assert client(scripts / "open_with_pool.py", home=fresh, offline=True).endswith("True\n")
