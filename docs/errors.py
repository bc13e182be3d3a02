"""Every error that a user can meet, read from the source: where exceptions are made, with the words of their messages."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOLE = "…"  # a value in a message
NOT_ABOUT_INPUT = (
    "AttributeError",
    "NotImplementedError",
    "SystemExit",
)  # a name or a method that is not there
TABLE = re.compile(r"^\| `([^`]*)` \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Message:
    """What an exception says.

    Args:
        kind: The exception's class.
        text: The message, with a hole for each value.
        path: The file, from the root of the tree.
        line: Where in it.
        where: The function or class that raises it.
    """

    kind: str
    text: str
    path: str
    line: int
    where: str

    @property
    def words(self) -> list[str]:
        """What stands between the values."""
        return [part for part in (each.strip() for each in self.text.split(HOLE)) if part]


def messages() -> list[Message]:
    """All of them, by file and line."""
    found = []
    for folder in ("revseg", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "revseg/kernels" not in path.as_posix():
                found += _of_file(path)
    return found


def _of_file(path: Path) -> list[Message]:
    tree = ast.parse(path.read_text())
    source, found = _Source(tree), []
    for where, function, call in _calls(tree):
        kind = ast.unparse(call.func).split(".")[-1].lstrip("_")
        if not kind.endswith("Error") or kind in NOT_ABOUT_INPUT or not call.args:
            continue
        for text in dict.fromkeys(source.texts(call.args[0], function)):
            if any(c.isalpha() for c in text.replace(HOLE, "")):
                said = " ".join(text.split())
                found.append(Message(_public(kind), said, str(path.relative_to(ROOT)), call.lineno, where))
    return sorted(found, key=lambda message: message.line)


def _public(kind: str) -> str:
    """A private class of errors is caught inside of its file, and handed on as a ValueError."""
    return "ValueError" if kind in ("MistakeError", "RefusedError") else kind


def _calls(
    node: ast.AST, where: str = "", function: ast.FunctionDef | None = None
) -> Iterator[tuple[str, ast.FunctionDef | None, ast.Call]]:
    """All calls, with the names of the function and class around them and the function itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            inner = child if isinstance(child, ast.FunctionDef) else function
            yield from _calls(child, f"{where}.{child.name}".lstrip("."), inner)
        else:
            if isinstance(child, ast.Call):
                yield where, function, child
            yield from _calls(child, where, function)


class _Source:
    """What expressions of a file may say."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def texts(self, node: ast.AST, function: ast.FunctionDef | None) -> list[str]:
        """The message or messages that an expression in a function may be."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
            return ["".join(map(str, parts))]
        if isinstance(node, ast.BinOp):
            sides = [self.texts(side, function) or [HOLE] for side in (node.left, node.right)]
            return [sides[0][0] + sides[1][0]]
        if isinstance(node, ast.IfExp):
            return self._all((node.body, node.orelse), function)
        if isinstance(node, ast.List):  # of problems
            return self._all(node.elts, function)
        if isinstance(node, ast.Name):
            return self._of_name(node.id, function)
        if isinstance(node, ast.Call):
            return self._of_call(node, function)
        return []

    def _all(self, nodes: Iterable[ast.AST], function: ast.FunctionDef | None) -> list[str]:
        return [text for node in nodes for text in self.texts(node, function)]

    def _of_name(self, name: str, function: ast.FunctionDef | None) -> list[str]:
        """What was assigned before, in the function or in the file, or what callers of the function give."""
        if function is not None and name in (arguments := [each.arg for each in function.args.args]):
            index = arguments.index(name)
            calls = [(there, call) for _, there, call in _calls(self.tree) if _name(call) == function.name]
            return [
                text
                for there, call in calls
                if len(call.args) > index
                for text in self.texts(call.args[index], there)
            ]
        assigned = [
            each
            for each in ast.walk(function or self.tree)
            if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == name
        ]
        if not assigned and function is not None:
            return self._of_name(name, None)
        return self._all((each.value for each in assigned), None)

    def _of_call(self, node: ast.Call, function: ast.FunctionDef | None) -> list[str]:
        """What a function of the file returns, or a text with values put in."""
        if isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            return [re.sub(r"\{[^}]*\}", HOLE, text) for text in self.texts(node.func.value, function)]
        called = self.functions.get(_name(node))
        if called is None:
            return []
        values = [each.value for each in ast.walk(called) if isinstance(each, ast.Return)]
        return self._all((value for value in values if value is not None), called)


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func)


def remedies() -> dict[str, tuple[str, str]]:
    """Cause and remedy by words of a message: the tables of troubleshooting.md."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return {words: (cause, remedy) for words, cause, remedy in TABLE.findall(page)}


def remedy_of(message: Message, told: dict[str, tuple[str, str]]) -> str:
    """What troubleshooting.md says of it, or nothing."""
    found = [remedy for words, (_, remedy) in told.items() if says(words, message)]
    return found[0] if found else ""


def says(words: str, message: Message) -> bool:
    """Whether words, with some values or none, can be a part of a message."""
    pieces = [re.escape(piece) for piece in re.split(r"\s*(?:\d[\d,.]*|\.\.\.|…)\s*", words) if piece]
    return bool(re.search(".*".join(pieces), message.text))


def page() -> str:
    """The page of all errors."""
    told, lines = remedies(), [HEAD]
    part = ""
    for message in messages():
        if _part(message) != part:
            part = _part(message)
            lines += [
                "",
                f"## {part}",
                "",
                "| message | error | raised by | more |",
                "| --- | --- | --- | --- |",
            ]
        cells = (f"`{message.text}`", message.kind, f"`{message.where}`", remedy_of(message, told))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _part(message: Message) -> str:
    first, second = Path(message.path).with_suffix("").parts[:2]
    return "revseg.ops (kernels)" if first == "kernels" else f"{first}.{second}".replace(".__init__", "")


HEAD = """\
# Every error

Made from the code by `python -m docs.generate`: each message that can be raised, with `…` for the values in it. A message says what was
expected and what came. What came is the cause; to give what was expected is the remedy, or what the message says last. Where there is
more to say, the last column does, and [errors, and what to do](troubleshooting.md) at length."""
