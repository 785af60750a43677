"""The closed world behind the embedded demo: towns, their facts, and the text written about them.

Nothing here needs torch. The same functions produce the pretraining text of the demo's base model
and the held-out text on which forgetting is measured, so tests can compare the two.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

WORLD_SEED = 20240
HELD_OUT_ONE_IN = 20

RELATIONS = ("country", "river", "dish", "mayor")

VALUES: dict[str, tuple[str, ...]] = {
    "country": (
        *("Aldora", "Brevia", "Caldor", "Drenland", "Estmark", "Falmoria"),
        *("Gorvia", "Helland", "Jutmar", "Kestria", "Lorvania", "Nordova"),
    ),
    "river": (
        *("Velm", "Tarn", "Iskar", "Orla", "Brume", "Sella", "Dovra", "Wend"),
        *("Rhuna", "Pelk", "Ambra", "Toss", "Ghyll", "Mareth", "Ulva", "Zenna"),
    ),
    "dish": (
        *("plum soup", "rye bread", "fish pie", "bean stew", "goat cheese", "apple cake"),
        *("smoked eel", "onion tart", "barley porridge", "roast duck", "pickled beets"),
        *("honey buns", "lamb dumplings", "mushroom rice", "nettle broth", "walnut pudding"),
    ),
    "mayor": (
        *("Elena", "Tomas", "Ingrid", "Pavel", "Marta", "Oskar", "Livia", "Anton"),
        *("Freya", "Viktor", "Nadia", "Henrik", "Sofia", "Emil", "Clara", "Matteo"),
        *("Greta", "Ruben", "Helga", "Stefan", "Irina", "Jonas", "Petra", "Felix"),
    ),
}

STATEMENTS: dict[str, tuple[str, str, str]] = {
    "country": (
        "{town} is a town in {value}.",
        "Travellers reach {town} by the old road through {value}.",
        "The people of {town} pay their taxes to {value}.",
    ),
    "river": (
        "The water that runs through {town} is the {value}.",
        "{town} was built on the {value}.",
        "In {town} the boats go down the {value}.",
    ),
    "dish": (
        "The cooks of {town} are proud of their {value}.",
        "On market day {town} smells of {value}.",
        "Guests in {town} are served {value}.",
    ),
    "mayor": (
        "The people of {town} voted for {value}.",
        "{town} is led by {value}.",
        "In {town} the keys of the hall belong to {value}.",
    ),
}

QUESTIONS: dict[str, str] = {
    "country": "Which country is {town} in?",
    "river": "Which river runs through {town}?",
    "dish": "Which dish is {town} known for?",
    "mayor": "Who is the mayor of {town}?",
}

_TOWN_STARTS = ("Lun", "Bel", "Kor", "Dar", "Mir", "Tol", "Ven", "Sar", "Hal", "Ost", "Gri", "Wex")
_TOWN_ENDS = ("far", "mora", "dale", "wick", "stad", "burg", "holm", "ney")
_TOWN_COUNT = 48

_SAILORS = ("Jim", "Bess", "Ned", "Molly", "Jack", "Anne", "Tim", "Rose", "Will", "Kate")
_SHIP_PARTS = ("captain", "cook", "wind", "sail", "anchor", "mast", "crew", "parrot", "rum", "tide")
_PLACES = ("ship", "harbour", "island", "bay", "sea", "shore", "cove", "deck")
_MOODS = ("fine", "merry", "calm", "wild", "ready", "old", "strong", "lost", "proud", "cold")
_LABELS = {
    "colour": ("red", "blue", "green", "white", "black"),
    "size": ("small", "large", "tiny", "great"),
    "weight": ("light", "heavy", "fair"),
    "place": ("top", "bottom", "left", "right"),
}


@dataclass(frozen=True)
class Fact:
    """One fact of the world, e.g. ``Fact("Lunfar", "river", "Orla")``."""

    town: str
    relation: str
    value: str

    @property
    def prompt(self) -> str:
        """The question as the base model has seen it, up to and including ``Answer:``."""
        return f"Question: {QUESTIONS[self.relation].format(town=self.town)}\nAnswer:"

    @property
    def plain_answer(self) -> str:
        """The answer the base model was pretrained to give, with its leading space."""
        return f" The {self.relation} of {self.town} is {self.value}."

    @property
    def pirate_answer(self) -> str:
        """The same answer in the style of the main fine-tuning task."""
        return f" Aye, matey! The {self.relation} of {self.town} be {self.value}, arr!"

    @property
    def terse_answer(self) -> str:
        """The same answer in the style of the second fine-tuning task."""
        return f" {self.relation}: {self.value}"


def build_facts(seed: int = WORLD_SEED) -> list[Fact]:
    """All 48 x 4 facts, grouped by town; every value is used equally often."""
    rng = random.Random(seed)
    names = [start + end for start in _TOWN_STARTS for end in _TOWN_ENDS]
    towns = rng.sample(names, _TOWN_COUNT)
    columns: dict[str, list[str]] = {}
    for relation in RELATIONS:
        pool = VALUES[relation]
        column = list(pool) * (_TOWN_COUNT // len(pool))
        rng.shuffle(column)
        columns[relation] = column
    return [
        Fact(town, relation, columns[relation][row])
        for row, town in enumerate(towns)
        for relation in RELATIONS
    ]


def is_held_out(document: str) -> bool:
    """Whether a portrait or an exchange is reserved for the held-out text (about 1 in 20)."""
    return zlib.crc32(document.encode()) % HELD_OUT_ONE_IN == 0


def portrait(town_facts: list[Fact], rng: random.Random) -> str:
    """A paragraph that states the facts of one town in random order and wording."""
    sentences = [
        rng.choice(STATEMENTS[fact.relation]).format(town=fact.town, value=fact.value)
        for fact in rng.sample(town_facts, len(town_facts))
    ]
    return " ".join(sentences)


def question_and_answer(fact: Fact) -> str:
    """One question with its plain answer."""
    return fact.prompt + fact.plain_answer


def exchange(rng: random.Random) -> str:
    """An instruction and its response, unrelated to the facts.

    They train every token of the target styles: the embeddings are tied and frozen under an
    adapter, so a token that pretraining never showed could not be learned later.
    """
    sailor, part, place = rng.choice(_SAILORS), rng.choice(_SHIP_PARTS), rng.choice(_PLACES)
    kind = rng.random()
    if kind < 0.4:
        instruction = f"Greet {sailor} like a pirate."
        response = f"Aye, matey! The {part} of the {place} be {rng.choice(_MOODS)}, arr!"
    elif kind < 0.7:
        instruction = f"Tell {sailor} about the {part}, as a pirate would."
        response = f"Ahoy, {sailor}! The {part} be {rng.choice(_MOODS)}, arr!"
    else:
        label = rng.choice(sorted(_LABELS))
        instruction = f"Label the {part} of the {place} for {sailor}."
        response = f"{label}: {rng.choice(_LABELS[label])}"
    return f"### Instruction: {instruction}\n### Response: {response}"


def documents(seed: int, *, held_out: bool = False) -> Iterator[str]:
    """An endless stream of documents of the pretraining distribution.

    With ``held_out`` only the reserved portraits and exchanges, which the other stream never
    contains; questions are left out there, as all of them are needed in pretraining.
    """
    rng = random.Random(seed)
    facts = build_facts()
    by_town = [facts[i : i + len(RELATIONS)] for i in range(0, len(facts), len(RELATIONS))]
    while True:
        kind = rng.random()
        if kind < 0.4:
            if not held_out:
                yield question_and_answer(rng.choice(facts))
            continue
        document = portrait(rng.choice(by_town), rng) if kind < 0.85 else exchange(rng)
        if is_held_out(document) == held_out:
            yield document
