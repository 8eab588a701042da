"""Profiles trained in shards by the workers of a Ray cluster. Workers exchange nothing: the head is fixed."""

from __future__ import annotations

import copy
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
from torch import nn

from ..bank.bank import ProfileBank
from ..bank.names import NameIndex
from ..core.fingerprint import digest_of_facts, fingerprint_weights
from ..core.progress import ProgressBar
from ..errors import ConfigError, FleetError, MissingExtraError, PeftXMaskError
from .data import ProfileData
from .run import TrainingRun
from .settings import ProfileTraining
from .shards import Shard, check_folders, cut, finish, is_finished, merged
from .trained_bank import TrainedBank, write_metrics


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
        ConfigError: a number is invalid.
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
                raise ConfigError(f"{name}={value!r} is invalid: expected a number of at least {least}.")

    @classmethod
    def of(cls, ray: RayFleet | int, settings: ProfileTraining, bank: ProfileBank | None) -> RayFleet:
        """The fleet that ``ray=`` asks for.

        Raises:
            ConfigError: it does not suit the settings.
        """
        fleet = ray if isinstance(ray, RayFleet) else cls(ray)
        if settings.head == "joint" or (
            settings.head is None and bank is None and not (settings.offset or settings.common_size)
        ):
            raise ConfigError(
                "head='joint' is invalid with ray=: workers exchange no gradients, so each would train a head of its "
                "own, while all profiles of a bank share one head. Pass head='first' (trained here, before the workers "
                "start), head='frozen' (as the model has it), or train in one job under accelerate launch."
            )
        if settings.args is None:
            raise ConfigError("Expected args= with ray=, found none: its output_dir is where the workers put shards.")
        if settings.args.world_size > 1:
            raise ConfigError(
                f"Expected one process that starts Ray workers, found {settings.args.world_size}. Use ray= or "
                "accelerate launch, not both."
            )
        return fleet

    @property
    def parts(self) -> int:
        """How many shards there are."""
        return self.shards or self.workers


@dataclass(frozen=True)
class FleetRun:
    """What a fleet trains.

    Attributes:
        settings: resolved ones.
        bank: which the profiles join, or None.
    """

    fleet: RayFleet
    model: nn.Module
    data: ProfileData
    settings: ProfileTraining
    bank: ProfileBank | None

    @cached_property
    def folder(self) -> Path:
        """The folder that all workers reach."""
        return Path(str(self.settings.trainer.output_dir)).absolute()

    @cached_property
    def shards(self) -> list[Shard]:
        """In the order in which they are merged."""
        return cut(self.data.rows, self.fleet.parts)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What distinguishes this run from others, in types that JSON has."""
        config = self.settings.config if self.bank is None else self.bank.config
        facts = {} if config is None else {key: _plain(value) for key, value in config.to_dict().items()}
        return {
            **self.data.fingerprint,
            **self.settings.identity(),
            "shards": len(self.shards),
            "config": digest_of_facts(facts),
            "base": fingerprint_weights(self.model.parameters()),
        }

    def train(self, resume: bool, progress: bool) -> TrainedBank:
        """Train the head if the settings say so, then the shards that are not finished, and merge all of them.

        Args:
            resume: keep the shards that are finished.
            progress: whether to show a bar.

        Raises:
            ConfigError: too few profiles, a model with an adapter, shards of another run, or what a worker refused.
            MissingExtraError: Ray is not installed.
            FleetError: a shard failed more often than it may be retried.
        """
        self._check(resume)
        bank = self._bank_with_head(progress) if self.settings.head == "first" else self.bank
        unfinished = [shard for shard in self.shards if not is_finished(shard, self.folder, self.facts)]
        if unfinished:
            ray = import_ray()
            profiles = sum(map(len, self.shards))
            with (
                self._connected(ray),
                ProgressBar("profiles", profiles, done=profiles - sum(map(len, unfinished)), shown=progress) as bar,
            ):
                self._train(ray, unfinished, bank, bar)
        summary = {"profiles": len(self.data.index), **self.settings.summary(), "shards": len(self.shards)}
        return merged(self.shards, self.folder, summary)

    def _check(self, resume: bool) -> None:
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

    def _bank_with_head(self, progress: bool) -> ProfileBank:
        """A bank without profiles whose head was trained here, for shards whose profiles join it."""
        one = NameIndex.build([self.data.index.name(0)])
        model = copy.deepcopy(self.model)
        settings = dataclasses.replace(self.settings, cache=None)  # of a pass or two, here alone
        run = TrainingRun.prepare(model, self.data, settings, None, progress=progress, index=one)
        run.train_head()
        return ProfileBank.from_model(run.profiles.model, list(one)).select([])

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
                raise ConfigError(
                    f"Expected {fleet.gpus_per_worker} GPUs for a worker on this machine, found {found:g}. Lower "
                    "gpus_per_worker."
                )
            yield
        finally:
            ray.shutdown()

    def _train(self, ray: Any, unfinished: Sequence[Shard], bank: ProfileBank | None, bar: ProgressBar) -> None:
        fleet = self.fleet
        task = ray.remote(num_cpus=fleet.cpus_per_worker, num_gpus=fleet.gpus_per_worker, max_retries=0)(train_shard)
        model = ray.put(self.model)
        waiting, tries, profiles = deque(unfinished), Counter[int](), sum(map(len, self.shards))
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
                    continue
                if refused:
                    raise ConfigError(f"A worker refused shard {shard.number} of {shard.total}: {refused}")
                left = [*waiting, *running.values()]
                again = f", {tries.total()} retries" if tries else ""
                bar.move_to(profiles - sum(map(len, left)), f"{len(left)} shards left{again}")
        finally:
            for other in running:
                ray.cancel(other, force=True)

    def _work(self, shard: Shard, bank: ProfileBank | None) -> Work:
        if bank is not None:
            names = (self.data.index.name(row) for row in range(shard.first, shard.end))
            bank = bank.select([name for name in names if name in bank])
        folder = shard.folder(self.folder)
        config = None if bank is not None else self.settings.config
        cache = self.settings.cache
        if cache not in (None, "auto"):
            cache = str(Path(cache) / folder.name)
        settings = self.settings.in_folder(str(folder / "training"), head="frozen", config=config, cache=cache)
        return Work(folder, *shard.part(self.data), settings, bank, self.fleet.cpus_per_worker, self.facts)

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
        validation: its validation examples, or None.
        settings: those of the run, with the shard's folder.
        bank: those of the shard's profiles that are in a bank, with its head; or None.
        threads: of torch.
        facts: what distinguishes the run from others.
    """

    folder: Path
    dataset: Any
    validation: Any
    settings: ProfileTraining
    bank: ProfileBank | None
    threads: int
    facts: dict[str, Any]


def train_shard(model: nn.Module, work: Work) -> str | None:
    """Train a shard, from its last checkpoint if a worker died over it; runs in a worker.

    Returns:
        Why the shard was refused, which no retry would change; None: it is finished.
    """
    torch.set_num_threads(work.threads)
    try:
        data = ProfileData.of(work.dataset, work.validation, work.settings.profile_column)
        run = TrainingRun.prepare(model, data, work.settings, work.bank, progress=False)
        trained = run.train(resume=True)
    except PeftXMaskError as error:
        return f"{type(error).__name__}: {error}"
    write_metrics(trained.metrics, work.folder / "training")
    finish(trained, work.folder, work.facts)
    return None


def _plain(value: Any) -> object:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


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
