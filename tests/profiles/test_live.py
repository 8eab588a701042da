"""A live bank: durable when a call returns, seen by every process, at a cost that does not depend on its size."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch
from bank_files import NAMES

from peft_xmask.bank.live import LIVE_FILE, LiveBank, is_live_bank
from peft_xmask.core.packing import pack_halves
from peft_xmask.errors import ConfigError, FileFormatError, MaskFormatError, PeftXMaskError
from peft_xmask.profiles import Profile, ProfileBank, compare_banks, verify_bank


@pytest.fixture
def live(bank, tmp_path):
    opened = LiveBank.create(tmp_path / "live", bank)
    yield opened
    opened.close()


def test_it_holds_what_the_bank_holds(bank, live, tmp_path):
    assert len(live) == 5
    assert list(live) == sorted(NAMES, key=str.encode)
    assert all(live.get(name) == live[name] == bank[name] for name in NAMES)
    assert live.get("nobody") is None
    assert "ann" in live
    assert "nobody" not in live
    assert all(torch.equal(live.kind.shared[name], tensor) for name, tensor in bank.shared.items())
    assert live.kind.config.pool_fingerprint == bank.config.pool_fingerprint
    with pytest.raises(KeyError, match="'nobody' in this live bank of 5"):
        live["nobody"]
    assert list(live.problems()) == []
    assert is_live_bank(tmp_path / "live")
    assert not is_live_bank(tmp_path)


def test_putting_and_deleting(bank, live):
    version = live.version
    assert live.put("eve", bank["ann"]) == version + 1
    assert live.put("bob", bank["ann"]) == version + 2
    assert live.put(7, bank["Zoë"]) == version + 3
    assert (len(live), live["eve"], live["bob"], live[7]) == (7, bank["ann"], bank["ann"], bank["Zoë"])
    assert live.delete("ann") == version + 4
    assert live.delete(7) == live.version == version + 5
    assert live.get("ann") is None
    assert len(live) == 5
    with pytest.raises(KeyError, match="'ann'"):
        live.delete("ann")
    assert (len(live), live.version) == (5, version + 5)


def test_several_are_put_at_once_or_not_at_all(bank, live):
    broken = Profile(bank["ann"].bits ^ 1, bank["ann"].gain_bits)
    version = live.version
    with pytest.raises(MaskFormatError, match="top_k"):
        live.put_all({"x": bank["ann"], "broken": broken})
    with pytest.raises(ConfigError, match="name"):
        live.put_all({"x": bank["ann"], "__base__": bank["ann"]})
    with pytest.raises(FileFormatError, match="offsets"):
        live.put("x", Profile(*bank["ann"].parts[:2], pack_halves(torch.zeros(2))))
    assert (live.version, len(live)) == (version, 5)
    assert live.put_all({"x": bank["ann"], "bob": bank["Zoë"]}) == version + 1
    assert (len(live), live["bob"]) == (6, bank["Zoë"])


def test_frozen_and_thawed_it_is_the_same(bank, live, tmp_path):
    live.put("a name\nof two lines", bank["bob"])
    frozen = live.freeze(tmp_path / "frozen")
    assert list(frozen) == list(live)
    assert verify_bank(tmp_path / "frozen").total == 0
    bank.add("a name\nof two lines", bank["bob"])
    assert not compare_banks(bank, frozen)
    again = LiveBank.create(tmp_path / "again", frozen)
    assert all(again[name] == live[name] for name in live)
    empty = LiveBank.create(tmp_path / "empty", bank.select([]))
    assert (len(empty), list(empty), len(empty.freeze(tmp_path / "nothing"))) == (0, [], 0)
    empty.put("ann", bank["ann"])
    assert empty["ann"] == bank["ann"]


def test_freezing_takes_one_moment(bank, live, tmp_path, monkeypatch):
    """A profile that is put while the bank is frozen is in the next frozen bank."""
    stream, other = LiveBank._stream, LiveBank.open(tmp_path / "live")

    def and_meanwhile(self, connection, part):
        thread = threading.Thread(target=other.put, args=(f"meanwhile {part}", bank["ann"]))
        thread.start()
        thread.join()
        yield from stream(self, connection, part)

    monkeypatch.setattr(LiveBank, "_stream", and_meanwhile)
    assert len(live.freeze(tmp_path / "frozen")) == 5
    assert len(live) == 7


def test_a_batch_is_served_from_it(bank, live, tiny_bert, tiny_batch):
    names = ["bob", "张伟", "ann"]
    batch = {key: tensor[:3] for key, tensor in tiny_batch.items()}
    served = bank.attach(tiny_bert())
    some = live.select(names).attach(tiny_bert())
    with torch.no_grad():
        expected = served(**batch, adapter_names=names).logits
        assert torch.equal(some(**batch, adapter_names=names).logits, expected)
        live.select(["ann"]).replace(some)
        torch.testing.assert_close(some(**batch, adapter_names=["ann"] * 3).logits[2], expected[2])
    with pytest.raises(KeyError, match="nobody"):
        live.select(["nobody"])


def test_offsets_are_kept(bank, tmp_path):
    content = bank.content()
    offsets = pack_halves(torch.arange(10.0).view(5, 2))
    rich = ProfileBank(bank.config, content.bits, content.gain_bits, NAMES, content.shared, offsets)
    live = LiveBank.create(tmp_path / "live", rich)
    assert live["bob"].offsets.tolist() == [2, 3]
    assert live.freeze(tmp_path / "frozen")["bob"] == rich["bob"]


def test_what_is_not_there_is_said(bank, live, tmp_path):
    bank.save_pretrained(tmp_path / "frozen")
    with pytest.raises(ConfigError, match="holds a frozen one: thaw it"):
        LiveBank.open(tmp_path / "frozen")
    with pytest.raises(ConfigError, match="found none"):
        LiveBank.open(tmp_path / "nowhere")
    with pytest.raises(FileFormatError, match=r"holds a live bank. Open it with LiveBank\.open"):
        ProfileBank.from_pretrained(tmp_path / "live")
    for taken in ("live", "frozen"):
        with pytest.raises(ConfigError, match="already holds a bank"):
            LiveBank.create(tmp_path / taken, bank)
    with pytest.raises(ConfigError, match="its own folder"):
        live.freeze(tmp_path / "live")


def test_a_changed_row_is_found(bank, live, tmp_path):
    with sqlite3.connect(tmp_path / "live" / LIVE_FILE) as connection:
        (ann,) = connection.execute("SELECT data FROM profiles WHERE name = ?", (b"ann",)).fetchone()
        connection.execute("UPDATE profiles SET data = ? WHERE name = ?", (ann, b"bob"))  # whole, and another's
    connection.close()
    assert live["ann"] == bank["ann"]
    with pytest.raises(MaskFormatError, match="'bob' is damaged"):
        live.get("bob")
    ((name, text),) = live.problems()
    assert name == "bob"
    assert "checksum" in text
    with pytest.raises(MaskFormatError, match="'bob' is damaged"):
        live.freeze(tmp_path / "frozen")
    assert not (tmp_path / "frozen" / "adapter_model.safetensors").exists()
    live.put("bob", bank["bob"])
    assert list(live.problems()) == []


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + b"\xff" * 200])
def test_what_is_no_live_bank_is_refused(content, tmp_path):
    (tmp_path / LIVE_FILE).write_bytes(content)
    with pytest.raises(FileFormatError):
        LiveBank.open(tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_damage_anywhere_is_refused_or_found(seed, bank, live, tmp_path):
    """Bytes that are flipped in the database give the right profile or an error of ours, never another profile."""
    live.close()
    content = bytearray((tmp_path / "live" / LIVE_FILE).read_bytes())
    chance = random.Random(seed)
    for _ in range(chance.choice([1, 3, 20])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / LIVE_FILE).write_bytes(content)
    with suppress(PeftXMaskError):
        opened = LiveBank.open(folder)
        for name in NAMES:
            with suppress(PeftXMaskError):
                found = opened.get(name)
                assert found is None or found == bank[name]
    assert verify_bank(folder).total >= 0


PUTTING = """
import itertools, sys
from peft_xmask.bank.live import LiveBank
live = LiveBank.open(sys.argv[1])
ann = live["ann"]
for turn in itertools.count():
    live.put(f"new {turn}", ann)
    if turn:
        live.delete(f"new {turn - 1}")
    print(turn, flush=True)
"""


def test_what_was_done_before_a_kill_is_there(live, bank, tmp_path):
    """Every line the writer printed is a put and a delete that had returned."""
    writer = subprocess.Popen(
        [sys.executable, "-c", PUTTING, str(tmp_path / "live")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        for _ in range(30):
            done = int(writer.stdout.readline())
            assert f"new {done}" in live or f"new {done + 1}" in live  # seen by this process as it happens
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.communicate()[0].split()
    done = int(rest[-1]) if rest else done
    names = {name for name in LiveBank.open(tmp_path / "live") if name.startswith("new")}
    assert names & {f"new {done}", f"new {done + 1}"}
    assert names <= {f"new {turn}" for turn in range(done, done + 2)}
    assert list(live.problems()) == []
    live.put("after", bank["ann"])  # the lock of a killed process is free


def test_threads_and_forked_processes_share_it(bank, live):
    def work(number):
        for turn in range(10):
            live.put(f"{number}-{turn}", bank["bob"])
            assert live[f"{number}-{turn}"] == bank["bob"]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    child = os.fork()
    if not child:
        try:
            work("child")
        finally:
            os._exit(0 if "child-9" in live else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(live) == 5 + 50
    assert list(live.problems()) == []


def test_putting_reads_and_writes_as_many_pages_whatever_the_size(many_profiles, tmp_path):
    """Counted, not timed: pages in the log after one put to a bank of 20 and to one of 20,000."""
    some = ProfileBank.from_model(many_profiles(num_profiles=20))
    rows = some.content()
    names = [f"user-{row}" for row in range(20_000)]
    many = ProfileBank(
        some.config, rows.bits.repeat(1000, 1, 1, 1), rows.gain_bits.repeat(1000, 1, 1), names, rows.shared
    )
    pages = []
    for number, bank in enumerate((some, many)):
        live = LiveBank.create(tmp_path / str(number), bank)
        live.put("new", some["3"])
        log = tmp_path / str(number) / f"{LIVE_FILE}-wal"
        pages.append(log.stat().st_size // 4096)
        live.close()
    assert pages[1] <= pages[0] + 4  # a tree of 20,000 is one or two levels deeper
