"""From a table of people to a bank: what all share, then a profile for each of them, in one run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..bank.bank import ProfileBank
from ..pool import AdapterPool
from .classifier_run import ClassifierRun
from .language_run import LanguageRun
from .masks import check_pool
from .report import MEASURES, Report
from .settings import Execution, PersonalizeSettings
from .table import CAUSAL_LM, PeopleTable

Step = Callable[[str], None]
"""Called with what is being done."""


@dataclass(frozen=True)
class Personalized:
    """A bank of people's profiles, and how good it is.

    Attributes:
        bank: as it was saved.
        report: see :class:`~peft_xmask.people.report.Report`.
    """

    bank: ProfileBank
    report: Report


def personalize(
    base: str | Path,
    table: PeopleTable,
    out: str | Path,
    settings: PersonalizeSettings | None = None,
    *,
    pool: str | AdapterPool = "random",
    ray: int | None = None,
    resume: bool = False,
    progress: bool = False,
    step: Step | None = None,
) -> Personalized:
    """Train what all people of a table share and a profile for each of them; save them as a bank.

    Layers come one after another, and each is kept only where held-out examples say that it helps. The common part
    costs a person nothing: a head on the base's mean hidden states, or for a language model an adapter that is always
    on. With labels, an offset is then added to the head's outputs (:mod:`~peft_xmask.training.offsets`). A mask changes
    the hidden states. Masks are kept, at one strength for all people, if they lower the validation loss by more than
    its standard error; otherwise their gains are zero.

    Args:
        base: a text encoder or decoder, for ``causal-lm`` a causal language model: a folder or Hub id. It is not
            changed.
        table: see :meth:`~peft_xmask.people.table.PeopleTable.read`.
        out: folder of the bank; an earlier bank there is replaced when all is trained. ``OUT-run`` beside it holds the
            checkpoints until then.
        settings: None: the defaults.
        pool: ``"random"``; ``"fit"``, to fit one to these people first
            (:func:`~peft_xmask.training.fit_pool.fit_pool`); a saved pool's folder or Hub id; or a pool. A pool's
            common part is used as it is. Unless it is random, the pool is saved with the bank, so that the folder needs
            nothing but the base.
        ray: train with so many Ray workers on this machine, each a part of the people. The result depends on the
            number, but not on which worker trained what.
        resume: continue an interrupted run from its last checkpoint; the bank is the same, byte for byte.
        progress: show a bar.
        step: called with what is being done.

    Raises:
        ConfigError: an invalid setting, a base that cannot do the task, or too few labels.
        PeftXMaskError: the pool does not fit the base.
        MissingExtraError: ``ray`` without Ray installed.
        OSError: the base cannot be found, or the disk is full; an earlier bank is then as it was.
    """
    settings = settings or PersonalizeSettings()
    told = step or (lambda _: None)
    started = time.perf_counter()
    directions = pool if isinstance(pool, AdapterPool) else None
    if directions is None and pool not in ("random", "fit"):
        directions = AdapterPool.from_pretrained(str(pool))
    told("reading the texts with the base model")
    kind = LanguageRun if table.task == CAUSAL_LM else ClassifierRun
    run: LanguageRun | ClassifierRun = kind.prepare(base, table, settings)
    folder = Path(f"{Path(out)}-run")
    if directions is not None:
        check_pool(directions, run.model, str(base))
    elif pool == "fit":
        told("fitting a pool to the people")
        directions = run.fit_pool(Execution(folder / "fit", None, None, resume, progress))
    told(f"training the common part and the profiles of {len(run.people):,} people")
    bank = run.train(Execution(folder, directions, ray, resume, progress))
    told("comparing the layers on held-out examples")
    layers, few = run.layers(bank)
    bank.save_pretrained(out, with_pool=True)
    shutil.rmtree(folder, ignore_errors=True)
    report = Report(
        measure=MEASURES[table.task],
        layers=layers,
        people=len(table.people),
        served_by_common=len(table.people) - len(bank),
        masks=run.strength > 0,
        few_labels=few,
        examples={part: len(examples) for part, examples in table.parts.items()},
        bank_bytes=sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file()),
        seconds=time.perf_counter() - started,
    )
    return Personalized(ProfileBank.from_pretrained(out), report)
