"""Amounts of memory as people write them."""

import pytest

from revseg.memory.budget import bytes_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[("1", 1), ("800B", 800), ("10GB", 10**10), ("10 gb", 10**10), ("1.5G", 15 * 10**8), (".5kB", 500)],
        *[
            ("800MiB", 800 * 2**20),
            ("2.25 GiB", 9 * 2**28),
            ("1T", 10**12),
            (" 3Ki ", 3072),
            (4e9, 4 * 10**9),
        ],
    ],
)
def test_units_are_decimal_or_binary(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    "text", ["", "much", "10 lots", "1.2.3GB", "0", "-1GB", "0.1B", "GB", None, "nan", "infGB"]
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match=r"expected a budget like 10GB or 800MiB, got"):
        bytes_of(text)
