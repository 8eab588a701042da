"""Which site of a pool belongs to which site of a model."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PoolMismatchError
from ..sites import partners


def match_names(names: Sequence[str], present: Sequence[str]) -> list[str]:
    """For each of ``names``, the one of ``present`` that means the same module, whatever the root is called.

    Raises:
        PoolMismatchError: another number of names, a name without a partner, or one that could have several.
    """
    matches = partners(names, present)
    missing = [name for name, found in zip(names, matches, strict=True) if not found]
    used = {found[0] for found in matches if found}
    left = [other for other in present if other not in used]
    if len(names) != len(present) or missing:
        differences = _listed(" Not in the pool", missing) + _listed(" Only in the pool", left)
        raise PoolMismatchError(
            f"Expected the {len(present)} sites of the pool, found {len(names)} in the model.{differences} Pass "
            "target_modules that name exactly the sites the pool was made for.",
            expected=sorted(present),
            found=sorted(names),
        )
    several = [(name, found) for name, found in zip(names, matches, strict=True) if len(found) > 1]
    if several or len(used) != len(names):
        raise PoolMismatchError(
            f"The sites of the pool and of the model cannot be paired one to one. Expected names such as "
            f"{present[0]!r}, found {names[0]!r}.{_listed(' Ambiguous', [name for name, _ in several])}",
            expected=sorted(present),
            found=sorted(names),
        )
    return [found[0] for found in matches]


def _listed(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title}: {', '.join(repr(name) for name in names[:3])}{more}."
