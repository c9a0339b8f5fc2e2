"""Names, objects and places that several grammars share."""

GIRLS = ("Anna", "Mary", "Lucy", "Sara", "Emma", "Nora", "Clara", "Julia", "Alice", "Rosa")
BOYS = ("Tom", "John", "Ben", "Paul", "Max", "Leo", "Oscar", "Peter", "David", "Sam")
ALL_NAMES = GIRLS + BOYS
OBJECTS = (
    "key",
    "map",
    "book",
    "ball",
    "lamp",
    "coin",
    "ring",
    "letter",
    "basket",
    "umbrella",
    "kite",
    "drum",
    "clock",
    "hat",
    "bag",
    "cake",
)
PLACES = (
    "garden",
    "kitchen",
    "forest",
    "market",
    "library",
    "station",
    "beach",
    "school",
    "park",
    "attic",
    "barn",
    "harbor",
)
