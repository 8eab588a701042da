"""Threads that share one model: wrong answers among many, and what it costs that rows belong to a pass.

    python tests/benchmarks/threads.py [--answers 10000]

The first part asks from eight threads, each time for another profile, and counts answers that are another profile's.
The second part times a small forward pass with masks at hand beside one of the same layers that hold the same mixed
adapters as constants, so the difference is all that finding the rows costs. Both are measured in turn, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from peft_xmask import BottleneckConfig, ProfileBank, XPEFTConfig
from peft_xmask.tuners.xpeft import XPEFTLayer

THREADS, ROWS = 8, 64


def base(width: int, blocks: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=width, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=2 * width)
    return BertForSequenceClassification(BertConfig(vocab_size=100, initializer_range=0.3, **sizes)).eval()


def crowd(width: int, blocks: int) -> PeftModel:
    config = XPEFTConfig(task_type="SEQ_CLS", num_adapters=20, bottleneck_size=4, scale=1.0, num_profiles=ROWS)
    model = get_peft_model(base(width, blocks), config)
    with torch.no_grad():
        model.base_model.table.xpeft_logits["default"].weight.normal_(std=0.01)
    return ProfileBank.from_model(model).attach(base(width, blocks))


def wrong(ask: Callable[[int], torch.Tensor], answers: int) -> int:
    expected = [ask(row) for row in range(ROWS)]
    begin = threading.Barrier(THREADS)

    def part(thread: int) -> int:
        begin.wait()
        asked = range(thread, answers, THREADS)
        return sum(not torch.allclose(ask(turn * 5 % ROWS), expected[turn * 5 % ROWS], atol=1e-4) for turn in asked)

    with ThreadPoolExecutor(THREADS) as executor:
        return sum(executor.map(part, range(THREADS)))


def count_wrong(answers: int) -> None:
    batch = {"input_ids": torch.arange(1, 7)[None]}
    model = crowd(32, 3)

    @torch.no_grad()
    def by_name(row: int) -> torch.Tensor:
        return model(**batch, adapter_names=[str(row)]).logits

    @torch.no_grad()
    def by_choice(row: int) -> torch.Tensor:
        model.set_profile(str(row))
        return model(**batch).logits

    for max_bytes in (0, 10**8):
        model.cache_profiles(max_bytes)
        for way, ask in (("adapter_names", by_name), ("set_profile", by_choice)):
            print(f"X-PEFT, {way}, cache of {max_bytes:,} bytes: {wrong(ask, answers)} wrong of {answers:,}")
    adapters = get_peft_model(base(32, 3), BottleneckConfig(init_weights=False, scale=20.0), adapter_name="0")
    for name in map(str, range(1, ROWS)):
        adapters.add_adapter(name, BottleneckConfig(init_weights=False, scale=20.0))
    adapters.eval()

    @torch.no_grad()
    def by_adapter(row: int) -> torch.Tensor:
        return adapters(**batch, adapter_names=[str(row)]).logits

    print(f"bottleneck, adapter_names: {wrong(by_adapter, answers)} wrong of {answers:,}")


def time_passes(rounds: int) -> None:
    """One profile, a batch of one text of 16 tokens, width 384, six blocks (MiniLM's shape)."""
    batch = {"input_ids": torch.arange(1, 17)[None]}
    found, constant = crowd(384, 6), crowd(384, 6)
    found.set_profile("3")
    constant.set_profile("3")
    with torch.no_grad():
        constant(**batch)
        for layer in constant.modules():
            if isinstance(layer, XPEFTLayer):
                pair = layer.pair("bank")
                layer.pair = lambda _, pair=pair: pair
        table = constant.base_model.table
        for hook in table.hooks:
            hook.remove()
        times: dict[str, list[float]] = {"found": [], "constant": []}
        for _ in range(rounds):
            for name, model in (("found", found), ("constant", constant)):
                start = time.perf_counter()
                model(**batch)
                times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(each[rounds // 10 :]) for name, each in times.items()}
    share = middle["found"] / middle["constant"] - 1
    print(
        f"forward pass: {1e3 * middle['found']:.3f} ms, {1e3 * middle['constant']:.3f} ms with constants ({share:+.2%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    time_passes(arguments.rounds)
    count_wrong(arguments.answers)


if __name__ == "__main__":
    main()
