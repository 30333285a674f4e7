"""URLs that land where a test wants them in the compiled table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

STRIPES = 64
_HASH_BITS = 64


def stripe_of(url: str) -> int:
    """Which of a lane's stripes the compiled cache keeps `url` in: the hash's top bits."""
    return (hash(url) % 2**_HASH_BITS) // (2**_HASH_BITS // STRIPES)


def urls() -> Iterator[str]:
    """Canonical URLs without end, all different, and none that a test names by itself."""
    return (f"http://11.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}:50051" for n in itertools.count())


def in_one_stripe(count: int, *, low_bits: int = 0) -> list[str]:
    """`count` URLs of one stripe whose hashes end in the same `low_bits` bits.

    With these bits equal they probe from the same slot of any table that small.
    """
    first = next(urls())
    want = stripe_of(first), hash(first) % 2**low_bits
    same = (url for url in urls() if (stripe_of(url), hash(url) % 2**low_bits) == want)
    return list(itertools.islice(same, count))
