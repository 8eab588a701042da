"""`demo` runs whole, in a process of its own, and its profile comes back the same."""

import re

from peft_xmask.cli.demo import NAMES, Row, conclusion
from peft_xmask.core.adapter_folder import ProfileSize


def test_a_short_demo(cli_process, minilm, tmp_path):
    done = cli_process("demo", "--steps", 2, "--out", tmp_path / "kept")
    assert done.status == 0, done.err
    for name in ("head only", "LoRA r=8", "bottleneck b=48", "X-PEFT, hard, N=100"):
        assert name in done.out
    assert re.search(r"\d+ predictions compared, all equal", done.out)
    assert "X-PEFT: 168 bytes per profile beside the head give accuracy" in done.out
    assert (tmp_path / "kept" / "xpeft" / "adapter_config.json").is_file()


def test_the_conclusion_is_computed_from_the_rows():
    accuracy = {"head": 0.5, "lora": 0.75, "bottleneck": 0.7, "xpeft": 0.25}
    payload = {"head": 0, "lora": 2000, "bottleneck": 5000, "xpeft": 100}
    rows = [Row(NAMES[m], accuracy[m], 1, ProfileSize(payload[m], 10, 20, 30), 0.1) for m in NAMES]
    assert conclusion(rows) == (
        "X-PEFT: 100 bytes per profile beside the head give accuracy 0.250, against 0.500 of the head alone, "
        "0.750 of LoRA r=8 at 20 times the bytes and 0.700 of bottleneck b=48 at 50 times the bytes."
    )
