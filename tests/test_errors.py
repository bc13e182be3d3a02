"""Every message that can be raised is asserted by a test, and says or is told what to do."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from docs import errors

TESTS = Path(__file__).parent
MESSAGES = errors.messages()
TORCHS = ["has been modified by an inplace operation"]  # in the tables, and not ours
SAYS_WHAT_TO_DO = re.compile(
    r"\bexpected\b|\bchoose\b|\bmust\b|\bneeds?\b|pip install|--(resume|overwrite|allow-change|root)"
    r"|[;:,] (\w+ )?(give|make|call|set|use|leave|predict|capture|fewer|put|wait|do|does)\b|to be the data set"
)


@cache
def asserted() -> tuple[str, str]:
    """The texts of all tests and of the blocks of docs/, as they stand there and word by word."""
    sources = [path.read_text() for path in TESTS.rglob("*.py") if path != Path(__file__)]
    for page in (TESTS.parent / "docs").glob("*.md"):
        sources += re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    texts = {
        re.sub(r"\\([^\w\s]|\s)", r"\1", node.value)  # of a pattern
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    pieces = [piece for text in texts for piece in re.split(r"\.[*+]\??|\\[dSw]\+?|\|", text)]
    return "\n".join(texts), "\n".join(in_words(piece) for piece in pieces)


def in_words(text: str) -> str:
    return " ".join(["", *re.findall(r"[\w'.=/,-]+|[^\w\s]", text), ""])


def is_asserted(message: errors.Message) -> bool:
    """Whether some text of a test holds three words of it that follow each other, or all of it with values."""
    texts, words = asserted()
    for part in message.words:
        run = in_words(part).split()
        length = min(3, len(run))
        if length > 1 and any(
            in_words(" ".join(run[i : i + length])) in words for i in range(len(run) - length + 1)
        ):
            return True
    return bool(re.search(r"[^\n]+".join(map(re.escape, message.words)), texts))


def named(message: errors.Message) -> str:
    return f"{message.path}: {message.text}"


def test_every_message_is_asserted_by_a_test():
    assert len(MESSAGES) > 350
    assert [named(message) for message in MESSAGES if not is_asserted(message)] == []


def test_every_message_says_what_to_do_or_the_tables_do():
    told = errors.remedies()
    assert [
        named(message)
        for message in MESSAGES
        if not SAYS_WHAT_TO_DO.search(message.text) and not errors.remedy_of(message, told)
    ] == []


@pytest.mark.parametrize("words", [words for words in errors.remedies() if words not in TORCHS])
def test_the_tables_tell_of_messages_that_there_are(words):
    assert any(errors.says(words, message) for message in MESSAGES)


def test_an_unknown_message_is_found():
    unknown = errors.Message(
        "ValueError",
        "the " + errors.HOLE + " moons consist wholly of " + errors.HOLE + " cheese",
        "revseg/moon.py",
        1,
        "moon",
    )
    assert not is_asserted(unknown)
    assert not SAYS_WHAT_TO_DO.search(unknown.text)
    assert not errors.says("expected cheese", unknown)
    assert errors.says("moons consist wholly of 7 cheese", unknown)
