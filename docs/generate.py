"""The pages of the reference, made from the code: `python -m docs.generate` writes them, a test holds them to it.

`command-line.md` has a table a command, from the dataclass whose fields are its flags; `api.md` a line a public name,
with its signature and docstring where the site is built; `errors.md` every message that can be raised (`docs/errors.py`).
"""

import ast
import importlib
import inspect
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from docs import errors
from revseg.commands import COMMANDS, named

MODULES = {
    "revseg": "what most users need",
    "revseg.couplings": "couplings of two streams",
    "revseg.convert": "networks made reversible",
    "revseg.memory": "measure, predict, plan, draw, fit",
    "revseg.losses": "losses by bands, never at full resolution",
    "revseg.lovasz": "a loss for the mean IoU",
    "revseg.models": "networks by name",
    "revseg.data": "data sets and what is done to samples",
    "revseg.metrics": "scores of predictions",
    "revseg.testing": "contracts of a block, for your own tests",
    "revseg.training": "runs of training",
    "revseg.inference": "trained networks in use",
    "revseg.ops": "the operations behind the layers, each with its plain twin",
}


def command_line() -> str:
    """The page of all commands and their flags."""
    lines = [
        "# Command line",
        "",
        "Made from the settings by `python -m docs.generate`. `revseg COMMAND --help` says the same.",
    ]
    for name, command in COMMANDS.items():
        settings = named(command.settings)
        lines += ["", f"## revseg {name}", "", inspect.cleandoc(settings.__doc__ or ""), ""]
        lines += ["| flag | value | default | meaning |", "| --- | --- | --- | --- |"]
        said = sentences(settings)
        for field in fields(settings):
            kind, is_positional = value_of(field)
            flag = field.name.upper() if is_positional else f"--{field.name.replace('_', '-')}"
            cells = (f"`{flag}`", kind, default_of(field), said[field.name])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def sentences(settings: type) -> dict[str, str]:
    """What stands below each field of a dataclass and of those that it builds on."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__[:-1]):
        (body,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def value_of(field: "Field[Any]") -> tuple[str, bool]:
    """The kind of a flag's value in short, and whether it stands without a flag."""
    text = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    is_positional = "Positional" in text
    text = re.sub(r"Positional\[(.*)\]|Annotated\[(.*), \(.*\)\]", r"\1\2", text)
    return re.sub(r"\b(pathlib\._local|pathlib|typing)\.", "", text).replace("Path", "path"), is_positional


def default_of(field: "Field[Any]") -> str:
    """The default as it would be typed."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return "required"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"`{value}`" if value not in (None, "") else ""


def api() -> str:
    """The page of all public names."""
    lines = ["# Python", "", "Made from the code by `python -m docs.generate`."]
    for name, about in MODULES.items():
        lines += ["", f"## {name}: {about}", ""]
        for public, thing in public_names(importlib.import_module(name)):
            first = inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0].replace("\n", " ")
            lines += [f"### {public}", "", first, "", *whole(thing), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def whole(thing: Any) -> list[str]:
    """Where the site puts signature and docstring; those themselves of what a symlink brings into the package."""
    if ".kernels." not in thing.__module__:
        return [f"::: {thing.__module__}.{thing.__qualname__}"]
    rest = inspect.cleandoc(thing.__doc__ or "").partition("\n\n")[2]
    signature = re.sub(r"'| at 0x\w+", "", str(inspect.signature(thing)))
    return ["```text", thing.__name__ + signature, *(["", rest] if rest else []), "```"]


def public_names(module: ModuleType) -> list[tuple[str, Any]]:
    """Classes and functions that a module defines or, as a folder's face, hands on."""
    is_face = hasattr(module, "__path__") or hasattr(module, "__all__")
    found = []
    for name in sorted(getattr(module, "__all__", vars(module))):
        thing = getattr(module, name)
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if thing.__module__ == module.__name__ or (is_face and thing.__module__.startswith("revseg.")):
            found.append((name, thing))
    return found


PAGES = {"command-line.md": command_line, "api.md": api, "errors.md": errors.page}

if __name__ == "__main__":
    for page, make in PAGES.items():
        Path(__file__).with_name(page).write_text(make())
