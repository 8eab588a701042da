"""A fleet over tiny data, whose batches can be made to go wrong; run as a script, which a test kills as a whole."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

from transformers import default_data_collator

from peft_xmask.profiles import RayFleet, train_profiles

path = Path(__file__).with_name("taught.py")
spec = importlib.util.spec_from_file_location("taught", path)
taught = importlib.util.module_from_spec(spec)
spec.loader.exec_module(taught)

VICTIM = 2  # the first label of the second of two shards


class Batches:
    """Notes which process made a batch of which shard; at one batch of the second shard, something happens.

    Without a file ``armed`` in the folder nothing does, nor in the process that starts the fleet.
    """

    def __init__(self, folder: Path, happening: str, at: int) -> None:
        self.folder, self.happening, self.at = folder, happening, at
        self.count, self.home = 0, os.getpid()

    def __getstate__(self):
        return {**self.__dict__, "count": 0}

    def __call__(self, examples):
        second = examples[0]["labels"] >= VICTIM
        with (self.folder / "batches.log").open("a") as log:
            log.write(f"{os.getpid()} {int(second)}\n")
        self.count += second
        if self.count == self.at and os.getpid() != self.home and (self.folder / "armed").exists():
            self.happen()
        return default_data_collator(examples)

    def happen(self) -> None:
        if self.happening == "killed":
            (self.folder / "armed").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.happening == "stuck":
            (self.folder / "stuck").touch()
            time.sleep(300)
        if self.happening == "wrong":
            raise OSError("the disk is on fire")


def made(folder: Path) -> dict[int, list[int]]:
    """Processes that made the batches of each shard, once for each batch."""
    lines = [tuple(map(int, line.split())) for line in (folder / "batches.log").read_text().splitlines()]
    return {shard: [process for process, of in lines if of == shard] for shard in (0, 1)}


def train(folder: Path, ray: RayFleet, happening: str = "nothing", at: int = 20, **fields):
    folder.mkdir(exist_ok=True)
    arguments = dict(save_strategy="steps", save_steps=4, save_total_limit=2, num_train_epochs=5)
    settings = dict(
        dataset=taught.examples(), validation=taught.examples(1), config=taught.config(), head="frozen", patience=None,
        progress=False,
    )  # fmt: skip
    return train_profiles(
        taught.base(), ray=ray, data_collator=Batches(folder, happening, at),
        args=taught.arguments(folder / "out", **arguments), **{**settings, **fields},
    )  # fmt: skip


if __name__ == "__main__":
    train(Path(sys.argv[1]), RayFleet(1, shards=2), "stuck")
