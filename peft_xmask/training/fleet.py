"""Profiles trained in shards by the workers of a Ray cluster. Workers exchange nothing: the head is fixed."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainingArguments

from ..bank.bank import ProfileBank
from ..core.fingerprint import fingerprint_weights
from ..errors import ConfigError, FleetError, MissingExtraError, PeftXMaskError
from .data import ProfileData
from .settings import Recipe, digest
from .shards import Shard, check_folders, cut, finish, is_finished, merged
from .trained_bank import TrainedBank


@dataclass(frozen=True)
class RayFleet:
    """Ray workers that train shards of profiles, for ``train_profiles(..., ray=RayFleet(8))``.

    The bank depends on the data, the settings and ``shards``, and not on how many workers there were, which of them
    trained what, or how many died: of machines that compute alike, with as many ``cpus_per_worker``, it is the same
    byte for byte.

    Args:
        workers: shards that are trained at the same time.
        shards: parts into which the profiles are divided; None: one for each worker. More of them lose less when a
            worker dies.
        cpus_per_worker: cores, and threads of torch.
        gpus_per_worker: accelerators, or a share of one.
        retries: how often a shard may be tried again.
        address: of a running cluster, as of ``ray.init``. None: the cluster that this process is connected to, or that
            of ``RAY_ADDRESS``, or else one on this machine, which is stopped in the end.

    Raises:
        ConfigError: a number that cannot be.
    """

    workers: int
    shards: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    retries: int = 2
    address: str | None = None

    def __post_init__(self) -> None:
        numbers = {"workers": 1, "shards": self.workers, "cpus_per_worker": 1, "gpus_per_worker": 0, "retries": 0}
        for name, least in numbers.items():
            value = getattr(self, name)
            if value is None and name == "shards":
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or name == "gpus_per_worker") or value < least:
                raise ConfigError(f"{name}={value!r} is not possible. Expected a number of at least {least}.")

    @classmethod
    def of(
        cls, ray: RayFleet | int, args: TrainingArguments | None, head: str | None, bank: ProfileBank | None
    ) -> RayFleet:
        """What ``ray=`` means.

        Raises:
            ConfigError: it does not go with the other arguments.
        """
        fleet = ray if isinstance(ray, RayFleet) else cls(ray)
        if head == "joint" or (head is None and bank is None):
            raise ConfigError(
                "head='joint' is not possible with ray=: workers exchange no gradients, so each would train a head of "
                "its own, and one bank holds profiles of one head. Pass head='first' (trained here, before the workers "
                "start), head='frozen' (as the model has it), or train in one job under accelerate launch."
            )
        if args is None:
            raise ConfigError("Expected args= with ray=, found none: its output_dir is where the workers put shards.")
        if args.world_size > 1:
            raise ConfigError(
                f"Expected one process that starts Ray workers, found {args.world_size}. Use ray= or accelerate launch."
            )
        return fleet

    @property
    def parts(self) -> int:
        """How many shards there are."""
        return self.shards or self.workers


@dataclass(frozen=True)
class FleetRun:
    """What a fleet trains."""

    fleet: RayFleet
    model: nn.Module
    data: ProfileData
    recipe: Recipe

    @cached_property
    def folder(self) -> Path:
        """The folder that all workers reach."""
        return Path(str(self.recipe.args.output_dir)).absolute()

    @cached_property
    def shards(self) -> list[Shard]:
        """In the order in which they are merged."""
        return cut(self.data.rows, self.fleet.parts)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What tells this run from others, as JSON can hold it."""
        config = self.recipe.config if self.recipe.bank is None else self.recipe.bank.config
        return {
            **self.recipe.settings(self.data),
            "shards": len(self.shards),
            "config": digest(None if config is None else config.to_dict()),
            "base": fingerprint_weights(self.model.parameters()),
        }

    def check(self, resume: bool) -> None:
        """Refuse what cannot be, before a worker is started.

        Raises:
            ConfigError: too few profiles, a model with an adapter, shards of another run.
            MissingExtraError: Ray is not installed.
        """
        import_ray()
        if len(self.data.index) < self.fleet.parts:
            raise ConfigError(
                f"Expected at least one profile for each of {self.fleet.parts} shards, found {len(self.data.index)} "
                "profiles. Take fewer workers or shards."
            )
        if hasattr(self.model, "peft_config"):
            raise ConfigError("Expected the base model with ray=, found one with adapters: each worker makes its own.")
        check_folders(self.shards, self.folder, resume)
        for shard in self.shards:
            is_finished(shard, self.folder, self.facts)

    def train(self, bank: ProfileBank | None, progress: bool) -> TrainedBank:
        """Train the shards that are not finished, and merge all.

        Args:
            bank: whose head is used, and whose masks are gone on from.
            progress: whether to show a bar.

        Raises:
            ConfigError: what a worker refused.
            FleetError: a shard failed more often than it may be tried again.
        """
        unfinished = [shard for shard in self.shards if not is_finished(shard, self.folder, self.facts)]
        if unfinished:
            ray = import_ray()
            with self._connected(ray), FleetBar(self.shards, unfinished, progress) as bar:
                self._train(ray, unfinished, bank, bar)
        return merged(self.shards, self.folder, {**self.recipe.told(self.data), "shards": len(self.shards)})

    @contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        if ray.is_initialized():
            yield
            return
        fleet, address = self.fleet, self.fleet.address or os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cores = fleet.workers * fleet.cpus_per_worker
            ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
        try:
            found = ray.cluster_resources().get("GPU", 0)
            if not address and found < fleet.gpus_per_worker:
                raise ConfigError(f"gpus_per_worker={fleet.gpus_per_worker} is not possible: found {found:g} here.")
            yield
        finally:
            ray.shutdown()

    def _train(self, ray: Any, unfinished: Sequence[Shard], bank: ProfileBank | None, bar: FleetBar) -> None:
        fleet = self.fleet
        task = ray.remote(num_cpus=fleet.cpus_per_worker, num_gpus=fleet.gpus_per_worker, max_retries=0)(train_shard)
        model = ray.put(self.model)
        waiting, tries = deque(unfinished), Counter[int]()
        running: dict[Any, Shard] = {}
        try:
            while waiting or running:
                while waiting and len(running) < fleet.workers:
                    shard = waiting.popleft()
                    running[task.remote(model, self._work(shard, bank))] = shard
                done = ray.wait(list(running), num_returns=1)[0][0]
                shard = running.pop(done)
                try:
                    refused = ray.get(done)
                except ray.exceptions.RayError as error:
                    tries[shard.number] += 1
                    if tries[shard.number] > fleet.retries:
                        raise self._failed(shard, tries[shard.number], error) from error
                    waiting.appendleft(shard)
                    bar.tried_again()
                    continue
                if refused:
                    raise ConfigError(f"A worker refused shard {shard.number} of {shard.total}: {refused}")
                bar.finished(shard)
        finally:
            for other in running:
                ray.cancel(other, force=True)

    def _work(self, shard: Shard, bank: ProfileBank | None) -> Work:
        recipe, args = self.recipe, self.recipe.args
        if bank is not None:
            names = (self.data.index.name(row) for row in range(shard.first, shard.end))
            bank = bank.select([name for name in names if name in bank])
        options = {
            "profile_column": self.data.column, "config": None if bank is not None else recipe.config, "bank": bank,
            "data_collator": recipe.data_collator, "head": "frozen", "mask_learning_rate": recipe.mask_learning_rate,
            "temperature": recipe.temperature, "max_passes": recipe.max_passes, "patience": recipe.patience,
            "example_loss": recipe.example_loss,
        }  # fmt: skip
        fields = {each.name: getattr(args, each.name) for each in dataclasses.fields(args) if each.init}
        folder, threads = shard.folder(self.folder), self.fleet.cpus_per_worker
        return Work(folder, *shard.part(self.data), threads, self.facts, (type(args), fields), options)

    def _failed(self, shard: Shard, tries: int, error: Exception) -> FleetError:
        cause = getattr(error, "cause", None) or error
        there = sum(is_finished(each, self.folder, self.facts) for each in self.shards)
        first, last = self.data.index.name(shard.first), self.data.index.name(shard.end - 1)
        return FleetError(
            f"Shard {shard.number} of {shard.total} (profiles {first!r} to {last!r}) failed {tries} times, the last "
            f"time with {type(cause).__name__}: {cause}. {there} shards are finished and stay in '{self.folder}'. Call "
            "again with resume=True to train the others.",
            shard=shard.number,
        )


@dataclass(frozen=True)
class Work:
    """What a worker is sent, besides the model.

    Attributes:
        folder: of the shard.
        dataset: its examples.
        validation: others, or None.
        threads: of torch.
        facts: what tells the run from others.
        args: class and fields: which device it is, each worker finds out.
        options: of :func:`~peft_xmask.training.train.train_profiles`.
    """

    folder: Path
    dataset: Any
    validation: Any
    threads: int
    facts: dict[str, Any]
    args: tuple[type[TrainingArguments], dict[str, Any]]
    options: dict[str, Any]


def train_shard(model: nn.Module, work: Work) -> str | None:
    """Train a shard, from its last checkpoint if a worker died over it; runs in a worker.

    Returns:
        Why it was refused, which trying again would not change; None: it is finished.
    """
    from .train import train_profiles

    torch.set_num_threads(work.threads)
    kind, fields = work.args
    args = kind(**{**fields, "output_dir": str(work.folder / "training")})
    try:
        trained = train_profiles(
            model, work.dataset, validation=work.validation, args=args, resume=True, progress=False, **work.options
        )
    except PeftXMaskError as error:
        return f"{type(error).__name__}: {error}"
    finish(trained, work.folder, work.facts)
    return None


class FleetBar:
    """A progress bar on standard error: profiles whose shards are finished.

    Args:
        shards: all.
        unfinished: those that are still to be trained.
        shown: whether it is.
    """

    def __init__(self, shards: Sequence[Shard], unfinished: Sequence[Shard], shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        timing = (TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, *timing, console=Console(stderr=True), transient=True, disable=not shown)
        profiles = sum(map(len, shards))
        self._task = self._bar.add_task(
            "profiles", total=profiles, completed=profiles - sum(map(len, unfinished)), facts=""
        )
        self._shards, self._finished, self._again = len(shards), len(shards) - len(unfinished), 0

    def __enter__(self) -> FleetBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def finished(self, shard: Shard) -> None:
        """Move it by a shard."""
        self._finished += 1
        self._bar.advance(self._task, len(shard))
        self._show()

    def tried_again(self) -> None:
        """Say that a shard is tried again."""
        self._again += 1
        self._show()

    def _show(self) -> None:
        again = f", {self._again} tried again" if self._again else ""
        self._bar.update(self._task, facts=f"{self._finished} of {self._shards} shards{again}")


def import_ray() -> Any:
    """Ray.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtraError(
            'A fleet of workers needs Ray, which is not installed: pip install "peft_xmask[fleet]"'
        ) from error
