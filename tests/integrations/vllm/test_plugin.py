"""The plugin without vLLM: paths, the bank that is watched, names that are served, settings."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_xmask import XPEFTConfig
from peft_xmask.bank.live import LiveBank
from peft_xmask.errors import ConfigError, FileFormatError, MaskFormatError, MergeError, PoolMismatchError
from peft_xmask.integrations.vllm import register
from peft_xmask.integrations.vllm.bank_source import BankSource, FoundProfile
from peft_xmask.integrations.vllm.folders import FolderStore
from peft_xmask.integrations.vllm.lora_path import is_profile, profile_at, settings_digest
from peft_xmask.integrations.vllm.lora_path import path_of as path_of_profile
from peft_xmask.integrations.vllm.ranks import fitting_rank
from peft_xmask.integrations.vllm.served import LockTable, ServedProfiles
from peft_xmask.integrations.vllm.settings import ServingSettings
from peft_xmask.integrations.vllm.versions import mode_for, was_tested
from peft_xmask.profiles import ProfileBank

NAMES = ["ann", "bob", "Zoë"]


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).eval()


def make_bank(seed: int = 1, **fields) -> ProfileBank:
    settings = {"num_adapters": 12, "bottleneck_size": 4, "activation": "identity", "insertion_form": "parallel"}
    config = XPEFTConfig(task_type="CAUSAL_LM", num_profiles=3, **{**settings, **fields})
    model = get_peft_model(llama(), config).eval()
    with torch.no_grad():
        model.masks("default").logits.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return ProfileBank.from_model(model, NAMES)


def path_of(bank: ProfileBank, name: str) -> str:
    return path_of_profile(bank[name], settings_digest(bank.config, bank.spec))


@pytest.fixture
def bank() -> ProfileBank:
    return make_bank()


@pytest.fixture
def folder(bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.mark.parametrize(
    "fields", [{}, {"mask_type": "soft"}, {"learn_gain": False}, {"num_adapters": 7, "top_k": 3}], ids=str
)
def test_a_profile_comes_back_from_its_path(fields):
    bank = make_bank(**fields)
    digest = settings_digest(bank.config, bank.spec)
    for name in NAMES:
        path = path_of(bank, name)
        assert path.startswith("/")  # vLLM leaves absolute paths alone
        assert is_profile(path)
        assert profile_at(path, bank.spec, digest) == bank[name]
    assert len({path_of(bank, name) for name in NAMES}) == 3
    assert not is_profile("/models/a-lora")


def test_paths_that_are_none_of_ours_are_refused(bank):
    digest = settings_digest(bank.config, bank.spec)
    path = path_of(bank, "ann")
    head, _, masks = path.rpartition("/")
    for wrong, error in (
        ("/models/a-lora", FileFormatError),
        (head, FileFormatError),
        (f"{head}/", FileFormatError),
        (f"{head}/{masks[:-4]}", MaskFormatError),
        (f"{head}/{masks}AAAA", MaskFormatError),
        (f"{head}/{masks[:-2]}*=", FileFormatError),
        (f"{head}/{'AAAA' * (len(masks) // 4)}", MaskFormatError),  # no mask chooses nothing
        (path.replace(digest, "0" * 16), PoolMismatchError),
    ):
        with pytest.raises(error):
            profile_at(wrong, bank.spec, digest)


@pytest.mark.parametrize(
    "fields",
    [
        {"pool_seed": 5},
        {"top_k": 3},
        {"mask_weighting": "mean"},
        {"insertion_form": "sequential"},
        {"mask_type": "soft"},
    ],
    ids=str,
)
def test_a_profile_of_other_settings_has_another_path(bank, fields):
    other = make_bank(**fields)
    assert settings_digest(other.config, other.spec) != settings_digest(bank.config, bank.spec)


def test_a_bank_that_is_replaced_is_opened_again(bank, folder):
    source = BankSource(str(folder))
    before = source.find("ann")
    assert before is not None
    assert before.path == path_of(bank, "ann")
    assert source.find("nobody") is None
    bank.add("ann", bank["bob"])
    bank.remove("Zoë")
    bank.add("new", bank["bob"])
    bank.save_pretrained(folder)
    after = source.find("ann")
    assert after is not None
    assert after.path == path_of(bank, "bob")
    assert after.version == before.version + 1
    assert source.find("Zoë") is None
    assert source.find("new") is not None
    assert source.find("ann").version == after.version  # opened once for one replacement


def test_a_bank_that_is_not_looked_at_is_not_opened_again(folder, monkeypatch):
    source = BankSource(str(folder))
    source.find("ann")
    monkeypatch.setattr(ProfileBank, "from_pretrained", None)
    assert source.find("bob") is not None


def test_a_live_bank_is_served_as_it_is_now(bank, tmp_path):
    live = LiveBank.create(tmp_path / "live", bank)
    source = BankSource(str(tmp_path / "live"))
    before = source.find("ann")
    assert before is not None
    assert before.path == path_of(bank, "ann")
    assert before.version == source.version()
    LiveBank.open(tmp_path / "live").put("ann", bank["bob"])  # by another process
    assert source.version() != before.version
    assert source.find("ann").path == path_of(bank, "bob")
    live.delete("bob")
    assert source.find("bob") is None
    assert source.find("Zoë").path == path_of(bank, "Zoë")
    LiveBank.create(tmp_path / "relu", make_bank(activation="relu"))
    with pytest.raises(MergeError, match="linear map"):
        BankSource(str(tmp_path / "relu"))


def test_a_damaged_bank_gives_an_error_until_it_is_whole(bank, folder, tmp_path):
    source = BankSource(str(folder))
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:100])  # truncated where it lies
    for _ in range(2):
        with pytest.raises(FileFormatError):
            source.find("ann")
    shutil.rmtree(folder)
    with pytest.raises((FileFormatError, ConfigError)):
        source.find("ann")
    bank.save_pretrained(folder)
    assert source.find("ann").path == path_of(bank, "ann")
    make_bank(pool_seed=7).save_pretrained(folder)
    with pytest.raises(PoolMismatchError, match="Restart"):
        source.find("ann")
    bank.save_pretrained(folder)
    assert source.find("ann").path == path_of(bank, "ann")


def test_a_damaged_profile_does_not_touch_the_others(folder):
    source = BankSource(str(folder))
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    start = 8 + length + next(each["data_offsets"][0] for key, each in header.items() if "xpeft_bits" in key)
    data[start : start + 2] = bytes(2)  # a mask that chooses nothing
    file.write_bytes(bytes(data))
    states = {}
    for name in NAMES:
        try:
            states[name] = source.find(name) is not None
        except MaskFormatError:
            states[name] = False
    assert sorted(states.values()) == [False, True, True]


def test_banks_that_vllm_cannot_serve_are_refused_at_the_start(tmp_path, tiny_bert):
    make_bank(activation="relu").save_pretrained(tmp_path / "relu")
    with pytest.raises(MergeError, match="linear map"):
        BankSource(str(tmp_path / "relu"))
    config = XPEFTConfig(task_type="SEQ_CLS", activation="identity", insertion_form="parallel", num_adapters=12)
    ProfileBank.from_model(get_peft_model(tiny_bert(), config)).save_pretrained(tmp_path / "head")
    with pytest.raises(ConfigError, match="classifier"):
        BankSource(str(tmp_path / "head"))
    with pytest.raises(ConfigError):
        BankSource(str(tmp_path / "nowhere"))


def request(name: str, path: str = "/peft-xmask/1/x/y") -> SimpleNamespace:
    return SimpleNamespace(lora_name=name, lora_path=path)


def test_profiles_used_last_stay_and_are_not_listed():
    static = request("static", "/models/static")
    served = ServedProfiles({"static": static}, 3)
    for name in "abc":
        served[name] = request(name)
    assert "a" in served  # used
    served["d"] = request("d")
    assert {name for name in "abcd" if name in served} == {"a", "c", "d"}
    assert served["c"].lora_name == "c"
    served["e"] = request("e")
    assert {name for name in "abcde" if name in served} == {"c", "d", "e"}
    assert list(served.values()) == [static]
    assert served["static"] is static
    del served["c"]
    served["f"] = request("f")
    assert {name for name in "cdef" if name in served} == {"d", "e", "f"}


def test_profiles_of_an_older_bank_are_known():
    served = ServedProfiles({}, 10)
    for name, version in (("a", 1), ("b", 2)):
        served.note(name, FoundProfile(f"/peft-xmask/1/x/{name}", version))
        served[name] = request(name, f"/peft-xmask/1/x/{name}")
    served["c"] = request("c")  # loaded by hand, of no version
    assert served.outdated(2) == ["a", "c"]
    served.update_profile("a", request("a", "/peft-xmask/1/x/new"), 2)
    assert served.outdated(2) == ["c"]
    assert served["a"].lora_path == "/peft-xmask/1/x/new"
    del served["c"]
    assert served.outdated(2) == []
    served.update_profile("gone", request("gone"), 2)  # forgotten meanwhile
    assert "gone" not in served


def test_locks_live_as_long_as_they_are_held():
    table = LockTable()
    order = []

    async def use(name: str, number: int) -> None:
        async with table[name]:
            order.append(("in", number))
            await asyncio.sleep(0)
            order.append(("out", number))

    async def main() -> None:
        await asyncio.gather(*(use("ann", number) for number in range(3)))

    asyncio.run(main())
    assert order == [(way, number) for number in range(3) for way in ("in", "out")]
    gc.collect()
    assert len(table) == 0


def test_settings_of_the_environment():
    assert ServingSettings.from_environment({}) is None
    assert ServingSettings.from_environment({"PEFT_XMASK_VLLM_BANK": ""}) is None
    found = ServingSettings.from_environment(
        {"PEFT_XMASK_VLLM_BANK": "b", "PEFT_XMASK_VLLM_MAX_NAMES": "5", "PEFT_XMASK_VLLM_CHECK_BASE": "0"}
    )
    assert found is not None
    assert (found.bank, found.max_names, found.check_base, found.mode) == ("b", 5, False, "auto")
    for name, value in (
        ("MODE", "disk"),
        ("MAX_NAMES", "0"),
        ("MAX_NAMES", "x"),
        ("CHECK_BASE", "yes"),
        ("BANKS", "b"),
    ):
        with pytest.raises(ConfigError, match=f"PEFT_XMASK_VLLM_{name}"):
            ServingSettings.from_environment({"PEFT_XMASK_VLLM_BANK": "b", f"PEFT_XMASK_VLLM_{name}": value})


def test_vllm_is_not_touched_unless_a_bank_is_named(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PEFT_XMASK_VLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it is an error
    register()


def test_memory_mode_is_for_versions_that_were_tested():
    assert [was_tested(version) for version in ("0.32.0", "0.32.1rc2", "0.31.9", "0.33.0", "1.0", "dev")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    assert mode_for("auto", "0.32.0") == "memory"
    assert mode_for("auto", "0.99.0") == "folder"
    assert mode_for("folder", "0.32.0") == "folder"
    assert [fitting_rank(rank) for rank in (1, 2, 8, 48, 300)] == [1, 8, 8, 64, 320]
    with pytest.raises(ConfigError, match="513"):
        fitting_rank(513)


def test_folders_are_written_once_and_named_by_their_content(bank, folder, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    settings = ServingSettings(str(folder), folder=tmp_path / "shm", base=str(tmp_path / "base"))
    store = FolderStore(BankSource(str(folder)), settings)
    first = store.find("ann")
    assert first is not None
    assert store.find("ann") == first
    assert store.find("nobody") is None
    lora = bank.to_lora("ann", tmp_path / "base")
    lora.save_pretrained(tmp_path / "wanted")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "shm" / first.path.rpartition("/")[2] / file).read_bytes() == (
            tmp_path / "wanted" / file
        ).read_bytes()
    bank.add("ann", bank["bob"])
    bank.save_pretrained(folder)
    second = store.find("ann")
    assert second is not None
    assert second.path != first.path
    assert second.path == store.find("bob").path
    assert len(list((tmp_path / "shm").iterdir())) == 2  # the old one stays: the engine may read it again


@pytest.fixture
def resolver_of(monkeypatch):
    """The resolver, over stand-ins for what it imports of vLLM."""
    stand_ins = {
        "vllm": {},
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(error=lambda *words: LOG.append(words))},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": SimpleNamespace},
        "vllm.lora.resolver": {"LoRAResolver": object},
    }
    LOG.clear()
    for name, content in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "peft_xmask.integrations.vllm.resolver", raising=False)
    from peft_xmask.integrations.vllm.resolver import ProfileResolver

    yield lambda source: ProfileResolver(source, source.find)
    sys.modules.pop("peft_xmask.integrations.vllm.resolver", None)


LOG: list[tuple[object, ...]] = []


def test_the_resolver_answers_with_masks_or_none(resolver_of, bank, folder):
    resolver = resolver_of(BankSource(str(folder)))
    noted = []
    resolver.on_found = lambda name, found: noted.append((name, found.version))
    found = asyncio.run(resolver.resolve_lora("base", "Zoë"))
    assert (found.lora_name, found.lora_path) == ("Zoë", path_of(bank, "Zoë"))
    assert noted == [("Zoë", 1)]
    assert asyncio.run(resolver.resolve_lora("base", "nobody")) is None
    assert not LOG
    (folder / "adapter_model.safetensors").unlink()
    assert asyncio.run(resolver.resolve_lora("base", "ann")) is None  # an exception would be a 500
    assert "ann" in str(LOG)
