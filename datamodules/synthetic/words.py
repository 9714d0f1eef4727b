"""What haystacks and needles are made of. All words have five letters, so that keys need the same room as bytes."""

import uuid
from typing import Literal

import numpy as np

Kind = Literal["words", "numbers", "uuids"]

ADJECTIVES = str.split(
    "amber azure blunt brave brief brisk broad civic clean clear close crisp curly dense eager early empty equal exact"
    " faint final fresh giant grand great green happy heavy ideal inner jolly large light local loyal lucky magic major"
    " merry minor moist muddy noble outer plain proud quick quiet rapid ready rigid rough round royal rural sharp shiny"
    " short silly small solid stark steep still sunny sweet swift tidal tired tough vivid vocal warty white whole young"
)
NOUNS = str.split(
    "acorn anvil apple badge bagel basin beach bench berry bison board brick broom brush cabin cable camel candy canoe"
    " cello chair chalk chess cliff cloud coral crane creek crown daisy dough eagle easel ferry field flame flute forge"
    " frost fruit glove grape grass heron honey horse hotel house jelly knife ledge lemon maple medal melon mirth mouse"
    " ocean olive otter panda paper peach pearl piano plate plaza quilt raven river robin salad shelf spoon table tiger"
    " torch towel tower trail train trout tulip wagon whale wheat zebra"
)
SENTENCES = (
    "The kettle sings before the water boils.",
    "A cat sleeps on the warm side of the roof.",
    "Nobody has opened the shop at the corner yet.",
    "The road bends twice and then follows the stream.",
    "Rain fell in the night and the gutters are full.",
    "He counts the boats as they come in.",
    "Bread takes an hour and patience.",
    "The letters on the sign have lost their paint.",
    "She reads the last page first.",
    "Wind moves the curtain and lets it fall again.",
    "Two children carry a ladder across the yard.",
    "The clock in the hall is never right.",
    "Snow stays longer under the trees.",
    "They walked home and talked about supper.",
    "A bus stops here every half an hour.",
    "The garden smells of wet stone.",
    "Somebody left an umbrella in the corridor.",
    "The old dog knows the way by himself.",
    "Lamps go on one by one along the harbour.",
    "Nothing else happened that afternoon.",
)


def draw_names(rng: np.random.Generator, kind: Kind, count: int, num_digits: int) -> list[str]:
    """`count` different words ("brisk-otter"), numbers of `num_digits` digits, or UUIDs (version 4)."""
    if kind == "uuids":
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
    chosen = rng.choice(how_many(kind, num_digits), count, replace=False)
    if kind == "numbers":
        return [str(number + 10 ** (num_digits - 1)) for number in chosen]
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]


def how_many(kind: Kind, num_digits: int) -> int:
    """Names of a kind that there are."""
    if kind == "words":
        return len(ADJECTIVES) * len(NOUNS)
    return 9 * 10 ** (num_digits - 1) if kind == "numbers" else 2**122
