"""Prompts of the GRPO benchmark, and rewards that a program can check."""

import re

NAMES = ("Lily", "Tom", "Ben", "Sara", "Tim", "Anna", "Max", "Mia")
OPENINGS = {
    "train": (
        "Once upon a time, there was a girl named {},", "One day, {} and {}", "{} and {} were", "{} had a big",
        "The dog looked at {} and", "It was a sunny day and {}",
    ),
    "validation": ("{} wanted to", "In the park, {} and {}"),
    "test": ("A boy named {}", "One night, {} and {}", "{} was very"),
}  # fmt: skip


def prompts(part):
    """Openings of tales with each name; no opening of one part is in another."""
    pairs = zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
    return [opening.format(*pair) for pair in pairs for opening in OPENINGS[part]]


def words(text):
    return re.findall(r"[a-z']+", text.lower())


S_WORDS = """
sad safe said sail sandy sang sat saw say scared sea see seed seen send shade share sharp she shell shiny ship shirt
shoe shop short shout show shy sick side silly sing sister sit sky sleep sleepy slept slide slow small smart smell
smile smiled snake snow so soap sock soft some something song soon sorry sound soup spoon spot spring squirrel star
start started stay step stick still stone stood stop stopped store storm story strange street string strong such
sudden sugar suit summer sun sunny sure surprise surprised swam sweet swim swing
"""
"""Words of children's tales that begin with s."""


def five_with_s(text):
    """Different words of :data:`S_WORDS`, as a share of five."""
    return min(1.0, len(set(words(text)).intersection(S_WORDS.split())) / 5)


def seven_words(text):
    """Whether the first sentence goes on for exactly seven words."""
    first, *rest = re.split(r"[.!?]", text)
    return float(bool(rest) and len(words(first)) == 7)


REWARDS = {"s-words": five_with_s, "seven words": seven_words}
