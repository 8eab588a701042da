"""Opens a bank while another process replaces it as fast as it can: ``python open_under_writing.py [OPENS]``.

One writer and three readers. A reader opens the bank, compares every profile with what was written, and checks that
the bank it has held since the start is still whole. Prints opens, failures and replacements; exit code 1 if one failed.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

READERS = 3
WRITER = """
import itertools, sys
import peft_xmask.bank.storage as storage
from peft_xmask.profiles import ProfileBank
storage.complete_card = lambda *_: None
bank = ProfileBank.from_pretrained(sys.argv[1])
small = bank.select(list(bank)[:2])
for turn in itertools.count(1):
    (bank, small)[turn % 2].save_pretrained(sys.argv[1])
    print(turn, flush=True)
"""


def make(folder: Path) -> None:
    from peft import get_peft_model
    from transformers import BertConfig, BertModel

    from peft_xmask import ProfileBank, XPEFTConfig

    torch.manual_seed(0)
    sizes = dict(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = get_peft_model(
        BertModel(BertConfig(**sizes)), XPEFTConfig(num_adapters=12, bottleneck_size=2, num_profiles=5)
    )
    with torch.no_grad():
        model.masks("default").logits.weight.normal_()
    ProfileBank.from_model(model, ["ann", "bob", "Zoë", "ann.b", "张伟"]).save_pretrained(folder)


def read(folder: Path, opens: int) -> None:
    """One reader: prints what happened at each open."""
    from peft_xmask import ProfileBank

    first = ProfileBank.from_pretrained(folder)
    known = {name: first[name] for name in first}
    seen: Counter[str] = Counter()
    for turn in range(opens):
        try:
            bank = ProfileBank.from_pretrained(folder)
            whole = len(bank) in (2, 5) and all(bank[name] == known[name] for name in bank if name in known)
            held = turn % 100 or all(first[name] == known[name] for name in known)
            seen[f"{len(bank)} profiles" if whole and held else "MIXED"] += 1
        except Exception as error:
            seen[f"FAILED: {error}"] += 1
    for what, count in seen.items():
        print(f"{count}\t{what}")


def main(opens: int) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bank"
        make(folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = Path(temporary) / "turns"
        with log.open("w") as turns:
            writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=turns, env=environment)
        command = [sys.executable, __file__, "--read", str(folder), str(-(-opens // READERS))]
        readers = []
        seen: Counter[str] = Counter()
        try:
            while not log.read_text() and writer.poll() is None:
                time.sleep(0.1)
            begin = int(log.read_text().split()[-1])
            readers = [
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(READERS)
            ]
            for reader in readers:
                for line in reader.communicate(timeout=3600)[0].splitlines():
                    count, what = line.split("\t", 1)
                    seen[what] += int(count)
            written = int(log.read_text().split()[-1]) - begin
        finally:
            for process in (writer, *readers):
                process.kill()
                process.wait()
    failed = sum(count for what, count in seen.items() if what.startswith(("FAILED", "MIXED")))
    print(f"{sum(seen.values()):,} opens by {READERS} readers, {written:,} replacements: {failed} failed")
    for what, count in sorted(seen.items()):
        print(f"  {count:,} {what}")
    return 1 if failed or not written or sum(seen.values()) < opens else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 24_000))
