"""`bank`: on real folders, each command once in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bank_files import MODEL, rewrite
from peft import get_peft_model

from peft_xmask import Profile, ProfileBank, XPEFTConfig
from peft_xmask.bank.storage import BITS


@pytest.fixture
def adapter(tiny_bert, tmp_path):
    """Saves an adapter of some profiles, another one for each seed."""

    def save(seed: int, profiles: int = 1, **fields) -> Path:
        settings = {"num_adapters": 20, "bottleneck_size": 4, "num_profiles": profiles, **fields}
        model = get_peft_model(tiny_bert(), XPEFTConfig(task_type="SEQ_CLS", **settings))
        with torch.no_grad():
            weight = model.masks("default").logits.weight
            weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        folder = tmp_path / "adapters" / f"user-{seed}"
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def bank(adapter, tmp_path) -> Path:
    """Five profiles."""
    folder = tmp_path / "bank"
    content = ProfileBank.from_pretrained(adapter(7, profiles=5)).content()
    config = XPEFTConfig.from_pretrained(tmp_path / "adapters" / "user-7")
    names = ["ann", "bob", "Zoë", "two words", "tab\there"]
    ProfileBank(config, content.bits, content.gain_bits, names, content.shared).save_pretrained(folder)
    return folder


def break_a_mask(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[BITS][2, 1, 0, 0].bitwise_xor_(1))


PROCESSES = """
import json, os, sys
from peft_xmask import cli
folder, commands = json.load(sys.stdin)
for number, arguments in enumerate(commands):
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        cli.main(arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def in_processes(commands, folder: Path) -> list[tuple[int, str]]:
    """Status and output of commands, each in a process of its own, all of which inherit the imports of one."""
    given = json.dumps([str(folder), [["bank", *map(str, arguments)] for arguments in commands]])
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES], input=given, capture_output=True, text=True, check=True, timeout=300
    )
    return [(int(status), (folder / f"{number}.1").read_text()) for number, status in enumerate(done.stdout.split())]


def test_every_command_in_a_process_of_its_own(adapter, bank, tmp_path):
    opened = ProfileBank.from_pretrained(bank)
    other, broken = tmp_path / "other", tmp_path / "broken"
    opened.select(["bob", "Zoë"]).save_pretrained(broken)
    opened.remove("ann")
    opened.save_pretrained(other)
    opened.select(["bob", "Zoë", "two words"]).save_pretrained(broken)
    break_a_mask(broken)
    built, merged, some = tmp_path / "built", tmp_path / "merged", tmp_path / "some"
    named = tmp_path / "names.txt"
    named.write_text("two words\nZoë\n", encoding="utf-8")
    commands = [
        ("build", f"eve={adapter(1)}", f"mallory={adapter(2)}", "--out", built),
        ("inspect", bank, "--json"),
        ("merge", bank, adapter(3), "--out", merged),
        ("select", bank, "bob", "--names", named, "--out", some),
        ("verify", broken),
        ("diff", bank, other),
    ]
    statuses, printed = zip(*in_processes(commands, tmp_path), strict=True)
    assert statuses == (0, 0, 0, 0, 1, 1), [path.read_text() for path in sorted(tmp_path.glob("*.2"))]
    assert list(ProfileBank.from_pretrained(built)) == ["eve", "mallory"]
    assert "Bank written to" in printed[0]
    facts = json.loads(printed[1])
    assert facts["profiles"] == 5
    assert facts["first_names"] == ["ann", "bob", "Zoë", "two words", "tab\there"]
    assert facts["sizes"]["profile_bytes"] == 2 * 3 * 3 + 3 * 2
    assert facts["sizes"]["head_bytes"] == 4 * (4 * 16 + 4)
    assert facts["sizes"]["file_bytes"] == (bank / MODEL).stat().st_size
    assert list(ProfileBank.from_pretrained(merged)) == ["ann", "bob", "Zoë", "two words", "tab\there", "0"]
    assert list(ProfileBank.from_pretrained(some)) == ["bob", "two words", "Zoë"]
    assert "row 2 ('two words'): expected the up-mask of site 0 with exactly top_k=10" in printed[4]
    assert "3 profiles checked, 1 problem" in printed[4]
    assert printed[5].splitlines() == ["- ann", "0 added, 1 removed, 0 changed, 4 unchanged"]


def test_building_from_a_folder_of_folders_and_from_one_of_many_rows(adapter, cli, tmp_path):
    folders = adapter(2).parent
    adapter(1)
    assert cli("bank", "build", folders, "--out", tmp_path / "bank").status == 0
    assert list(ProfileBank.from_pretrained(tmp_path / "bank")) == ["user-1", "user-2"]
    many = adapter(5, profiles=3)
    assert cli("bank", "build", many, "--out", tmp_path / "rows").status == 0
    assert list(ProfileBank.from_pretrained(tmp_path / "rows")) == ["0", "1", "2"]
    (tmp_path / "names.json").write_text('["x", "y\\n", "z"]')
    assert cli("bank", "build", many, "--names", tmp_path / "names.json", "--out", tmp_path / "named").status == 0
    assert list(ProfileBank.from_pretrained(tmp_path / "named")) == ["x", "y\n", "z"]
    assert "'y\\n'" in cli("bank", "inspect", tmp_path / "named").out
    assert cli("bank", "build", folders / "user-1", "--out", tmp_path / "one").status == 0
    assert list(ProfileBank.from_pretrained(tmp_path / "one")) == ["user-1"]


def test_differences_as_json(bank, cli, tmp_path):
    edited = ProfileBank.from_pretrained(bank)
    bits = edited["bob"].bits.clone()
    bits[0, 0] ^= torch.tensor([255, 255, 15], dtype=torch.uint8)
    edited.add("bob", Profile(bits, edited["bob"].gain_bits))
    edited.add("new", edited["ann"])
    edited.save_pretrained(tmp_path / "edited")
    done = cli("bank", "diff", bank, tmp_path / "edited", "--json")
    assert done.status == 1
    assert json.loads(done.out) == {
        "added": ["new"], "removed": [], "changed": [{"name": "bob", "bits": 20, "gains": 0, "offsets": 0}],
        "unchanged": 4, "settings": {}, "same_head": True,
    }  # fmt: skip
    assert "~ bob: 20 bits" in cli("bank", "diff", bank, tmp_path / "edited").out


def test_a_bank_is_replaced_only_when_that_is_said(bank, cli, tmp_path):
    done = cli("bank", "select", bank, "ann", "--out", bank)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "--replace" in done.err
    assert len(ProfileBank.from_pretrained(bank)) == 5
    old = ProfileBank.from_pretrained(bank)
    assert cli("bank", "select", bank, "ann", "--out", bank, "--replace").status == 0
    assert list(ProfileBank.from_pretrained(bank)) == ["ann"]
    assert old["Zoë"].bits.any()


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_adding_removing_and_renaming(kind, adapter, bank, cli, tmp_path):
    if kind == "live":
        assert cli("bank", "thaw", bank, "--out", tmp_path / "live").status == 0
        facts = json.loads(cli("bank", "inspect", tmp_path / "live", "--json").out)
        assert (facts["kind"], facts["profiles"], facts["version"], len(facts["first_names"])) == ("live bank", 5, 1, 5)
        assert "live bank" in cli("bank", "inspect", tmp_path / "live").out

    def names() -> list[str]:
        if kind == "frozen":
            return list(ProfileBank.from_pretrained(bank))
        assert cli("bank", "freeze", tmp_path / "live", "--out", tmp_path / "again", "--replace").status == 0
        return list(ProfileBank.from_pretrained(tmp_path / "again"))

    place = {"frozen": bank, "live": tmp_path / "live"}[kind]
    before = set(names())
    done = cli("bank", "add", place, f"eve={adapter(1)}", adapter(2))
    assert (done.status, done.out) == (0, f"2 profiles put into {place}\n")
    assert set(names()) == before | {"eve", "user-2"}
    done = cli("bank", "add", place, f"new={adapter(3)}", f"bob={adapter(3)}")
    assert done.status == 2
    assert "has a profile 'bob' already" in done.err
    assert "new" not in names()
    assert cli("bank", "add", place, f"bob={adapter(3)}", "--replace").status == 0
    assert cli("bank", "rename", place, "eve", "evelyn").status == 0
    assert "'user-2'" in cli("bank", "rename", place, "evelyn", "user-2").err
    assert cli("bank", "remove", place, "user-2", "tab\there").status == 0
    assert "nobody" in cli("bank", "remove", place, "nobody").err
    assert set(names()) == (before | {"evelyn"}) - {"tab\there"}
    single = ProfileBank.from_pretrained(adapter(3))["0"]
    found = ProfileBank.from_pretrained({"frozen": bank, "live": tmp_path / "again"}[kind])
    assert found["bob"] == single
    assert cli("bank", "verify", place).status == 0


def test_merging_with_a_preference(adapter, bank, cli, tmp_path):
    other = tmp_path / "other"
    ProfileBank.from_profiles({"bob": adapter(1), "new": adapter(2)}).save_pretrained(other)
    out = tmp_path / "out"
    done = cli("bank", "merge", bank, other, "--out", out)
    assert done.status == 2
    assert f"'bob' is in both '{bank}' and '{other}'" in done.err
    for prefer, winner in (("first", bank), ("last", other)):
        assert cli("bank", "merge", bank, other, "--prefer", prefer, "--out", out, "--replace").status == 0
        merged = ProfileBank.from_pretrained(out)
        assert set(merged) == {*ProfileBank.from_pretrained(bank), "new"}
        assert merged["bob"] == ProfileBank.from_pretrained(winner)["bob"]
    assert "prefer='best'" in cli("bank", "merge", bank, other, "--prefer", "best", "--out", out, "--replace").err


def test_deep_verification(bank, cli, tiny_bert, tmp_path):
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    assert cli("bank", "verify", bank, "--deep", "--base", base).status == 0
    assert "--deep" in cli("bank", "verify", bank, "--base", base).err
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight += 1
    model.save_pretrained(base)
    done = cli("bank", "verify", bank, "--deep", "--base", base)
    assert done.status == 1
    assert "fingerprint" in done.out


def test_mistakes_are_one_line(adapter, bank, cli, tmp_path):
    out = ("--out", tmp_path / "out")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    stranger = adapter(6, pool_seed=3)
    for arguments, words in (
        (("inspect", tmp_path / "nowhere"), "neither a folder"),
        (("inspect", tmp_path / "bad.txt"), "neither a folder"),
        (("verify", tmp_path / "nowhere"), "neither a folder"),
        (("select", bank, "nobody", *out), "No profile 'nobody'"),
        (("select", bank, *out), "found none"),
        (("select", bank, "ann", "ann", *out), "'ann' for rows 0 and 1"),
        (("select", bank, "--names", tmp_path / "bad.txt", *out), "UTF-8"),
        (("select", bank, "--names", tmp_path / "bad.json", *out), "JSON list"),
        (("select", bank, "--names", tmp_path / "none.txt", *out), "none.txt"),
        (("merge", bank, bank, *out), f"'ann' (and 4 more) is in both '{bank}' and '{bank}'"),
        (("merge", bank, stranger, *out), f"in '{stranger}'. Profiles serve the base and pool"),
        (("build", tmp_path / "empty", *out), "NAME=FOLDER"),
        (("build", f"a={stranger}", f"a={stranger}", *out), "Two adapters are called 'a'"),
        (("build", f"a={tmp_path / 'nowhere'}", *out), "neither a folder"),
        (("build", f"a={bank}", *out), "one profile, found 5"),
        (("diff", bank, adapter(8, num_adapters=40)), "of one size"),
        (("add", tmp_path / "nowhere", f"a={stranger}"), "Expected the folder of a bank"),
        (("add", bank, f"a={stranger}"), f"as '{bank}' has"),
        (("freeze", bank, *out), "found none. It holds a frozen one"),
        (("thaw", bank, "--out", bank), "already holds a bank"),
        (("merge", bank, "--out", tmp_path / "bad.txt"), "a bank is a folder"),
    ):
        done = cli("bank", *arguments)
        assert done.status == 2, (arguments, done)
        assert words in done.err, (arguments, done.err)
        assert done.err.strip().splitlines()[-1].startswith("error:")
        assert not (tmp_path / "out").exists()
