"""``peft-xmask pool``: make and look at adapter pools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..pool import BOTTLENECK_SIZE, NUM_ADAPTERS
from .console import bytes_text, new_folder, output, print_facts, print_json, progress_bar
from .pool_fit import fit

if TYPE_CHECKING:
    from ..pool import AdapterPool

app = typer.Typer(help="Make and look at adapter pools.", no_args_is_help=True)
app.command()(fit)

Out = Annotated[Path, typer.Option(help="Folder to write the pool to.")]
Adapters = Annotated[list[str], typer.Argument(help="Adapter folders or Hub ids.")]
DType = Annotated[str | None, typer.Option(help="Storage: float32, bfloat16 or float16. Default: the adapters' own.")]


@app.command()
def build(
    out: Out,
    num_adapters: Annotated[int, typer.Option(help="Adapters in the pool.")] = NUM_ADAPTERS,
    bottleneck_size: Annotated[int, typer.Option(help="Width of each adapter.")] = BOTTLENECK_SIZE,
    seed: Annotated[int, typer.Option(help="The pool is its seed.")] = 0,
) -> None:
    """Create a random pool. Only its seed is saved."""
    from ..pool import AdapterPool

    _save(AdapterPool.random(num_adapters, bottleneck_size, seed), out)


@app.command()
def from_lora(adapters: Adapters, out: Out, dtype: DType = None) -> None:
    """Stack PEFT LoRA adapters of equal targets and rank into a pool."""
    from ..core.files import dtype_from_name
    from ..pool import AdapterPool

    storage = None if dtype is None else dtype_from_name(dtype)
    with progress_bar(f"reading {len(adapters)} adapters"):
        pool = AdapterPool.from_lora(adapters, dtype=storage)
    _save(pool, out)


@app.command()
def from_bottleneck(adapters: Adapters, out: Out, dtype: DType = None) -> None:
    """Stack bottleneck adapters, ours or AdapterHub's seq_bn, into a pool."""
    from ..core.files import dtype_from_name
    from ..pool import AdapterPool

    storage = None if dtype is None else dtype_from_name(dtype)
    with progress_bar(f"reading {len(adapters)} adapters"):
        pool = AdapterPool.from_bottleneck(adapters, dtype=storage)
    _save(pool, out)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a pool.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a pool. No model is needed."""
    from .inspection import describe_pool

    facts = describe_pool(folder)
    if as_json:
        print_json(facts)
    else:
        fitting = facts.pop("fitting", None)
        print_facts({**facts, "nbytes": bytes_text(facts["nbytes"])})
        if fitting:
            print_facts({name.replace("_", " "): value for name, value in fitting.items()}, title="fitted to")


def _save(pool: AdapterPool, out: Path) -> None:
    from ..pool.storage import JSON_FILE

    save(pool, new_folder(out, JSON_FILE))


def save(pool: AdapterPool, folder: Path) -> None:
    """Write a pool to a folder that was made for it, and say what it is."""
    with progress_bar("writing the pool"):
        pool.save_pretrained(folder)
    print_facts(
        {
            "kind": pool.kind,
            "adapters": pool.num_adapters,
            "bottleneck": pool.bottleneck_size,
            "fingerprint": pool.fingerprint,
            "stored": bytes_text(pool.nbytes),
        }
    )
    output.print(f"Pool written to {folder}", markup=False, soft_wrap=True)
