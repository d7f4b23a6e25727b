"""The cache keeps to its bytes and forgets what was not asked for longest."""

from __future__ import annotations

import random

from service.cache import ByteCache


def test_the_least_recently_used_leaves_first() -> None:
    cache: ByteCache[str] = ByteCache(30)
    for name in "abc":
        cache.put(name, name.upper(), 10)
    assert cache.get("a") == "A"
    cache.put("d", "D", 10)
    assert [cache.get(name) for name in "abcd"] == ["A", None, "C", "D"]


def test_large_values_push_out_several_and_too_large_ones_are_not_kept() -> None:
    cache: ByteCache[str] = ByteCache(30)
    for name in "abc":
        cache.put(name, name, 10)
    cache.put("large", "l", 25)
    assert (len(cache), cache.used_bytes) == (1, 25)
    cache.put("larger", "l", 31)
    assert cache.get("larger") is None
    assert cache.get("large") == "l"


def test_replacing_counts_the_new_size_alone() -> None:
    cache: ByteCache[int] = ByteCache(10)
    cache.put("a", 1, 4)
    cache.put("a", 2, 6)
    assert (cache.get("a"), cache.used_bytes) == (2, 6)
    cache.put("a", 3, 11)
    assert (cache.get("a"), cache.used_bytes) == (None, 0)


def test_bytes_stay_within_the_bound_whatever_comes() -> None:
    cache, dice = ByteCache[int](1000), random.Random(0)
    sizes: dict[int, int] = {}
    for _ in range(2000):
        key = dice.randrange(50)
        sizes[key] = dice.randrange(1, 400)
        cache.put(key, key, sizes[key])
        assert cache.used_bytes <= 1000
        assert cache.used_bytes == sum(sizes[k] for k in sizes if cache.get(k) is not None)


def test_a_bound_of_zero_keeps_nothing() -> None:
    cache: ByteCache[int] = ByteCache(0)
    cache.put("a", 1, 1)
    assert cache.get("a") is None
