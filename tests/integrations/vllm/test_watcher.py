"""The API server's watch over a bank: what happens to profiles that are served when it is replaced."""

from __future__ import annotations

import asyncio
import itertools
import shutil

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: VLLM=yes .ci/run makes an environment with it")

from test_plugin import make_bank
from vllm.lora.request import LoRARequest

from peft_xmask.bank.live import LiveBank
from peft_xmask.integrations.vllm.api_server import Watcher
from peft_xmask.integrations.vllm.bank_source import BankSource
from peft_xmask.integrations.vllm.served import ServedProfiles
from peft_xmask.profiles import Profile


def served_from(source: BankSource, names: list[str]) -> tuple[ServedProfiles, Watcher]:
    served = ServedProfiles({}, 10)
    ids = itertools.count(100)
    watcher = Watcher(source, served, lambda: next(ids), 1.0)
    for number, name in enumerate(names, 1):
        found = source.find(name)
        assert found is not None
        served.note(name, found)
        served[name] = LoRARequest(name, number, found.path)
    return served, watcher


def test_a_replaced_bank(tmp_path):
    bank = make_bank()
    bank.save_pretrained(tmp_path)
    source = BankSource(str(tmp_path))
    served, watcher = served_from(source, ["ann", "bob", "Zoë"])
    before = {name: served[name] for name in served}
    asyncio.run(watcher.look())
    assert all(served[name] is before[name] for name in before)  # nothing happened, nothing changed

    bank.add("ann", bank["bob"])
    bank.remove("Zoë")
    bank.save_pretrained(tmp_path)
    asyncio.run(watcher.look())
    assert (served["ann"].lora_int_id, served["ann"].lora_path) == (100, before["bob"].lora_path)
    assert served["bob"] is before["bob"]
    assert "Zoë" not in served
    assert served.outdated(source.version()) == []


def test_a_bank_that_cannot_be_read_changes_nothing(tmp_path):
    bank = make_bank()
    bank.save_pretrained(tmp_path)
    source = BankSource(str(tmp_path))
    served, watcher = served_from(source, ["ann"])
    before = served["ann"]
    shutil.rmtree(tmp_path)
    asyncio.run(watcher.look())
    assert served["ann"] is before
    bank.add("ann", bank["bob"])
    bank.save_pretrained(tmp_path)
    asyncio.run(watcher.look())
    assert served["ann"].lora_path != before.lora_path


def test_a_damaged_profile_does_not_keep_the_others_from_changing(tmp_path, monkeypatch):
    bank = make_bank()
    live = LiveBank.create(tmp_path / "live", bank)
    source = BankSource(str(tmp_path / "live"))
    served, watcher = served_from(source, ["ann", "bob"])
    before = {name: served[name] for name in served}
    live.put("bob", bank["Zoë"])
    nothing = Profile(torch.zeros_like(bank["ann"].bits), bank["ann"].gain_bits)
    monkeypatch.setattr(type(live.kind), "check", lambda self, profile: None)
    live.put("ann", nothing)
    monkeypatch.undo()
    asyncio.run(watcher.look())
    assert served["ann"] is before["ann"]
    assert served["bob"].lora_path != before["bob"].lora_path
    assert served.outdated(source.version()) == []
