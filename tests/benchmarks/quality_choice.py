"""Which methods a task has, and which of them somebody means."""

from quality_lm import LM_METHODS
from quality_methods import GROUPS, METHODS
from quality_tasks import TASKS


def methods_of(task):
    return LM_METHODS if TASKS[task].head == "lm" else METHODS


def wanted(task, words):
    """Methods of a task by their names and those of groups; what a task does not have is left out of a group.

    Raises:
        ValueError: a word that is neither.
    """
    known = methods_of(task)
    groups = {name: [m for m in group if m in known] for name, group in GROUPS.items()} | {"all": list(known)}
    methods = list(dict.fromkeys(name for word in words for name in groups.get(word, [word])))
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"{task}: no such method: {', '.join(unknown)}. Expected: {', '.join([*groups, *known])}")
    return methods
