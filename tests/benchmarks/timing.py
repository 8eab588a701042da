"""What the benchmarks share: timing in turn, summaries, models that share one base's weights, and printing."""

import copy
import gc
import json
import math
import os
import random
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

WIDTH = 130


@dataclass(frozen=True)
class Summary:
    """Median of repeated measurements, its quartiles, and a 95 % interval of the median (by order statistics)."""

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    count: int

    @classmethod
    def of(cls, values):
        values = sorted(values)
        count = len(values)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if count > 1 else values * 3
        reach = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
        return cls(statistics.median(values), (low, high), (values[reach], values[count - 1 - reach]), count)

    def verdict(self, limit):
        """Whether the median is at most ``limit``, as far as its interval says."""
        low, high = self.interval
        return "met" if high <= limit else "missed" if low > limit else "undecided: the interval spans it"

    def as_dict(self, digits=4):
        return {
            "median": round(self.median, digits),
            "quartiles": [round(value, digits) for value in self.quartiles],
            "interval": [round(value, digits) for value in self.interval],
            "count": self.count,
        }


def seconds(run, device="cpu"):
    """Wall time of one call, the accelerator's queue emptied before and after."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def in_turn(candidates, rounds, limit, advance, device="cpu", warmup=2):
    """Wall times of every candidate in every round, in an order drawn anew for each (always the same draws).

    No new round begins after ``limit`` seconds, except that there are always six: fewer have no 95 % interval.
    """
    order, draws = list(candidates), random.Random(0)
    for _ in range(warmup):
        for run in candidates.values():
            run()
    times = {name: [] for name in order}
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 6 and time.perf_counter() - start > limit:
                break
            for name in draws.sample(order, len(order)):
                times[name].append(seconds(candidates[name], device))
            advance()
    finally:
        gc.enable()
    return times


def paired_ratio(times, name, reference):
    """Summary of ``times[name] / times[reference]``, each ratio within one round."""
    return Summary.of([a / b for a, b in zip(times[name], times[reference], strict=True)])


def twin(model):
    """A copy of a model that shares its parameters: tuners replace modules, and those measured write to no weight."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def load_average():
    """Runnable processes over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def out():
    """Where tables go."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def progress():
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


def print_json(facts):
    """The last line."""
    print(json.dumps(facts), flush=True)


def _wait(device):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)
