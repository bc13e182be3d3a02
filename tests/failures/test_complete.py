"""No line of the list of failures is without a test.

The list has 91 lines on rounding, autograd, state and systems. A test that was written from one
has its number in a comment at the end of its first line (`# 22, 23`) or at the start of its
docstring (`22, 23: ...`).
"""

import re
from pathlib import Path

LINES = range(1, 92)
NUMBERS = re.compile(r'(?:# |""")(\d+(?:, \d+)*)(?:$|: )', re.MULTILINE)


def numbers(source):
    return {int(number) for found in NUMBERS.findall(source) for number in found.split(", ")}


def test_every_line_of_the_list_has_a_test():
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert set(LINES) <= set().union(*map(numbers, sources))


def test_numbers_are_read_from_comments_and_docstrings_alone():
    assert numbers('def test_x():  # 3, 14\n    """61: statistics."""\n    assert x == 7  # 9 of them') == {
        3,
        14,
        61,
    }
