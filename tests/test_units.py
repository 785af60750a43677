"""Numbers as people write and read them."""

from __future__ import annotations

import math

import pytest

from loratune.units import byte_size, clock, duration, parse_bytes, parse_count, significant


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (significant(4.25308), "4.253"),
        (significant(2.824e-07), "2.8e-07"),
        (significant(0.0), "0"),
        (significant(None), "–"),
        (significant(294912), "294,912"),
        (significant(math.inf), "inf"),
        (byte_size(294912), "295 kB"),
        (byte_size(999), "999 B"),
        (byte_size(1500), "1.5 kB"),
        (byte_size(999_999), "1 MB"),
        (byte_size(2.34e9), "2.34 GB"),
        (byte_size(None), "–"),
        (duration(0.25), "0.25 s"),
        (duration(13.59), "13.6 s"),
        (duration(431.0), "7 min 11 s"),
        (duration(431.0, 2), "7 min 10 s"),
        (duration(600), "10 min"),
        (duration(7200), "2 h"),
        (duration(7260), "2 h 1 min"),
        (duration(float("inf")), "–"),
        (duration(float("nan")), "–"),
        (clock(4.6), "0:05"),
        (clock(3723), "1:02:03"),
    ],
)
def test_numbers_read_as_people_write_them(shown: str, wanted: str) -> None:
    assert shown == wanted


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("900", 900),
        ("0.5kb", 500),
        ("2TB", 2 * 10**12),
        ("-1GB", None),
        ("20M", None),
        ("", None),
        ("GB", None),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("589824", 589824),
        ("589_824", 589824),
        ("9.2M", 9_200_000),
        ("7B", 7 * 10**9),
        ("6MB", None),
        ("", None),
    ],
)
def test_counts_are_read_with_their_units(text: str, count: int | None) -> None:
    assert parse_count(text) == count
