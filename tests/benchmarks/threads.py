"""Threads that share one model: wrong answers among many, and what it costs that rows belong to a pass.

    python tests/benchmarks/threads.py [--answers 10000]

The first part asks from eight threads, each time for another profile, and counts answers that are another profile's.
The second part times a small forward pass as it is beside one in which the layers hold the same mixed adapters as
constants, so the difference is all that finding the rows costs. One model does both in turn, in random order; what is
counted is the CPU time of its thread, and the figure is the median of the differences.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from peft_xmask import BottleneckConfig, MagnitudeMaskConfig, ProfileBank, WeightAdapterConfig, XPEFTConfig
from peft_xmask.tuners.xpeft import XPEFTLayer

THREADS, ROWS = 8, 64
IN_PLACE = {
    "magnitude mask": lambda: MagnitudeMaskConfig(density=0.1),
    "weight adapter": lambda: WeightAdapterConfig(target="bias", r=2, inference_mode=True),
}


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
    distances = torch.pdist(torch.stack(expected).flatten(1), p=float("inf"))
    assert distances.min() > 1e-3, "some rows cannot be told apart, so a wrong answer could not be seen"
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
    for title, config in IN_PLACE.items():
        written = get_peft_model(base(32, 3), config(), adapter_name="0")
        for row in range(1, ROWS):
            written.add_adapter(str(row), config())
        written.eval()
        for name in map(str, range(ROWS)):
            written.set_adapter(name, inference_mode=True)
            with torch.no_grad():
                written.base_model.table.holders[name].weight.normal_(std=0.3)

        @torch.no_grad()
        def by_written(row: int, model: PeftModel = written) -> torch.Tensor:
            return model(**batch, adapter_names=[str(row)]).logits

        print(f"{title}, adapter_names: {wrong(by_written, answers)} wrong of {answers:,}")


def time_passes(rounds: int) -> None:
    """One profile, a batch of one text of 16 tokens, width 384, six blocks (MiniLM's shape)."""
    batch = {"input_ids": torch.arange(1, 17)[None]}
    model = crowd(384, 6)
    model.set_profile("3")
    root = model.get_base_model()
    hooks = root._forward_pre_hooks, root._forward_hooks
    times: dict[str, list[float]] = {"found": [], "constant": []}
    with torch.no_grad():
        for _ in range(rounds // 10):
            model(**batch)
        layers = [layer for layer in model.modules() if isinstance(layer, XPEFTLayer)]
        pairs = [layer.pair("bank") for layer in layers]

        def prepare(name: str) -> None:
            constant = name == "constant"
            root._forward_pre_hooks, root._forward_hooks = (OrderedDict(), OrderedDict()) if constant else hooks
            for layer, pair in zip(layers, pairs, strict=True):
                layer.__dict__.pop("pair", None)
                if constant:
                    layer.pair = lambda _, pair=pair: pair

        for _ in range(rounds):
            for name in random.sample(sorted(times), 2):
                prepare(name)
                start = time.thread_time()
                model(**batch)
                times[name].append(time.thread_time() - start)
    extra = [found - constant for found, constant in zip(*times.values(), strict=True)]
    median, constant = statistics.median(extra), statistics.median(times["constant"])
    quarters = [f"{statistics.median(extra[part::4]) / constant:.2%}" for part in range(4)]
    print(
        f"forward pass with constants: {1e3 * constant:.3f} ms of CPU time; finding the rows: {1e6 * median:.0f} us, "
        f"{median / constant:.2%} (quarters of {rounds:,} pairs: {', '.join(quarters)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    time_passes(arguments.rounds)
    count_wrong(arguments.answers)


if __name__ == "__main__":
    main()
