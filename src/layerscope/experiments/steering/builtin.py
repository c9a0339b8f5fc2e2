"""Neutral texts, and contrasts for the embedded model: reviews that praise or blame."""

from __future__ import annotations

from random import Random

from layerscope.interventions.steering.contrasts import Contrast, ContrastSet

DEMO = "demo:reviews"
NEUTRAL = (
    "The train to the coast leaves at nine in the morning.",
    "There are seven days in a week and twelve months in a year.",
    "She put the keys on the table and closed the door.",
    "Water turns into ice when it gets cold enough.",
    "The capital of France is Paris.",
    "My brother works in an office near the river.",
    "The library is open from Monday to Friday.",
    "Two and three make five.",
    "He bought some bread and milk on his way home.",
    "In winter the sun sets early in the north.",
)
"""Sentences of no property in particular, whose next tokens steering should leave alone."""
_OPENINGS = (
    ("I watched The Silver River last week.", ("acting", "story", "music", "ending", "cast")),
    ("I read Seven Lanterns last week.", ("story", "writing", "plot", "ending", "hero")),
    ("I ate at Casa Rosa last week.", ("food", "service", "soup", "waiter", "dessert")),
    ("I stayed at The Old Mill last week.", ("room", "service", "bed", "breakfast", "staff")),
    ("Midnight Train is a new film.", ("acting", "story", "music", "ending", "cast")),
    ("Review of the hotel The Lantern.", ("room", "service", "bed", "breakfast", "staff")),
)
_PRAISE = ("wonderful", "excellent", "brilliant", "great", "delightful", "perfect", "lovely")
_BLAME = ("terrible", "awful", "boring", "poor", "dreadful", "horrible", "disappointing")


def demo_reviews(count: int = 60, *, seed: int = 0) -> ContrastSet:
    """Return reviews that begin alike and go on with praise or with blame."""
    rng = Random(seed)
    return ContrastSet("reviews", tuple(_contrast(rng) for _ in range(count)))


def demo_openings(count: int = 12, *, seed: int = 1) -> tuple[str, ...]:
    """Return beginnings of reviews that say nothing yet, for texts."""
    rng = Random(seed)
    return tuple(_contrast(rng).prompt for _ in range(count))


def _contrast(rng: Random) -> Contrast:
    opening, aspects = rng.choice(_OPENINGS)
    first, second = rng.sample(aspects, 2)
    sides = [
        f"{words[a]}. The {second} was {words[b]}."
        for a, b in [(rng.randrange(len(_PRAISE)), rng.randrange(len(_PRAISE)))]
        for words in (_PRAISE, _BLAME)
    ]
    return Contrast(sides[0], sides[1], f"{opening} The {first} was")
