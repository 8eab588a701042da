"""Shards: profiles that are trained apart from the others, and the folders in which their banks wait to be merged.

```
output_dir/shard-00003-of-00008/training/       what its Trainer writes: checkpoints, metrics.json
output_dir/shard-00003-of-00008/bank/           its profiles
output_dir/shard-00003-of-00008/finished.json   written last: a shard without it is not finished
output_dir/bank/                                all profiles
```
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import write_text
from ..errors import ConfigError, FileFormatError
from .checkpoints import difference
from .data import ProfileData
from .trained_bank import TrainedBank, read_metrics

FINISHED_FILE = "finished.json"
_FOLDERS = "shard-*-of-*"


@dataclass(frozen=True)
class Shard:
    """Profiles that follow one another in the order of the data.

    Attributes:
        number: from 0.
        total: of shards.
        first: row of its first profile.
        end: row after its last one.
    """

    number: int
    total: int
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    def folder(self, output_dir: Path) -> Path:
        """Where all that is written of it lies."""
        return output_dir / f"shard-{self.number:05}-of-{self.total:05}"

    def part(self, data: ProfileData) -> tuple[Any, Any]:
        """Its examples, in their order, and those for validation or None; no others come with them."""
        held_out = None if data.held_out is None else self._places(data.held_out)
        validation = None if held_out is None or not held_out else own_examples(data.validation, held_out)
        return own_examples(data.dataset, self._places(data.rows)), validation

    def _places(self, rows: Tensor) -> list[int]:
        places: list[int] = ((rows >= self.first) & (rows < self.end)).nonzero().view(-1).tolist()
        return places


def cut(rows: Tensor, total: int) -> list[Shard]:
    """Shards of about as many examples each, and of at least one profile.

    They depend on the data and their number alone.

    Args:
        rows: of each example's profile, long ``[n]``; each of P rows has one.
        total: at most P.
    """
    counts = torch.bincount(rows)
    least = torch.arange(1, total)
    aims = least * (len(rows) / total)
    ends = torch.searchsorted(torch.cumsum(counts, 0).double(), aims.double()) + 1
    ends = torch.cummax(ends - least, 0).values + least if total > 1 else ends
    ends = ends.clamp(max=len(counts) - total + least)
    bounds = [0, *ends.tolist(), len(counts)]
    return [Shard(number, total, *bounds[number : number + 2]) for number in range(total)]


def own_examples(dataset: Any, places: Sequence[int]) -> Any:
    """Examples by themselves: sent to another process, they take none of the others along."""
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "select"):
        return [dataset[place] for place in places]
    part = dataset.select(places)
    form = part.format
    table = part.with_format("arrow")[:].take(list(range(len(part))))  # a copy: slices take their whole table along
    alone = type(part)(table, info=part.info)
    return alone.with_format(form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"])


def check_folders(shards: Sequence[Shard], output_dir: Path, resume: bool) -> None:
    """Refuse a folder with shards of another run, or with any if this one does not go on.

    Raises:
        ConfigError: as said.
    """
    wanted = {shard.folder(output_dir).name for shard in shards}
    found = {path.name for path in output_dir.glob(_FOLDERS)}
    if found and not resume:
        raise ConfigError(
            f"Expected no shards in '{output_dir}', found {len(found)}: {', '.join(sorted(found)[:3])}. Train with "
            "resume=True to go on from them, or in another output_dir."
        )
    if found - wanted:
        raise ConfigError(
            f"Expected shards of a run in {len(shards)} parts in '{output_dir}', found '{min(found - wanted)}'. Train "
            "in as many parts as before, or in another output_dir."
        )


def is_finished(shard: Shard, output_dir: Path, run: Mapping[str, Any]) -> bool:
    """Whether a shard's bank is there.

    Raises:
        ConfigError: it is one of another run.
        FileFormatError: the file that says so cannot be read.
    """
    path = shard.folder(output_dir) / FINISHED_FILE
    if not path.is_file():
        return False
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise FileFormatError(
            f"'{path}' cannot be read: {error}. Remove it, and the shard is trained again."
        ) from error
    if found != run:
        raise ConfigError(
            f"'{path.parent}' is a shard of another run: it was trained with {difference(found, run)}. Train in "
            "another output_dir, or delete the shards if they are no longer needed."
        )
    return True


def finish(trained: TrainedBank, folder: Path, run: Mapping[str, Any]) -> None:
    """Write a shard's bank, and then that it is finished."""
    trained.save_pretrained(folder / "bank")
    write_text(folder / FINISHED_FILE, json.dumps(run, indent=1))


def merged(shards: Sequence[Shard], output_dir: Path, told: dict[str, Any]) -> TrainedBank:
    """The banks of all shards as one, in their order, streamed from file to file."""
    folders = [shard.folder(output_dir) for shard in shards]
    banks = [TrainedBank.from_pretrained(folder / "bank") for folder in folders]
    banks[0].config = copy.copy(banks[0].config)
    banks[0].config.training = told
    whole = TrainedBank.merge(banks, output_dir / "bank")
    assert isinstance(whole, TrainedBank)
    for folder in folders:
        whole.metrics.update(read_metrics(folder / "training"))
    return whole
