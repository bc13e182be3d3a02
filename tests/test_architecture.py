"""Imports go down: the picture of the house, held by a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [  # the lowest first; a folder or file imports from floors below its own, or from its own folder
    {"__version__", "kernels", "files"},
    {"ops", "data", "metrics"},
    {"engine", "losses"},
    {"couplings", "layers"},
    {"sequence"},
    {"memory"},
    {"models", "testing", "convert"},
    {"training", "inference"},
    {"cli", "commands"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "revseg").rglob("*.py") if "kernels" not in path.parts)


def part(module: str) -> str:
    """The name under revseg that a dotted module name belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "revseg":
            found.update(f"revseg.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name == "revseg" or name.startswith("revseg.")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = path.relative_to(ROOT / "revseg").with_suffix("").parts[0]
    if here in ("__init__", "__main__"):
        return  # the faces hand on from everywhere
    assert here in LEVEL, f"give revseg/{here} a line in FLOORS"
    for name in imports(path):
        there = part(name)
        if there != here:
            assert there in LEVEL, f"{path.name} imports {name}"
            assert LEVEL[there] < LEVEL[here], f"{path.name} imports {name}, which is not below it"


def test_kernels_see_tensors_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert all(part(name) == "kernels" for name in imports(path)), path.name


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import revseg", ["torch", "numpy"]),
        ("import revseg.cli", ["torch", "numpy"]),
        (
            "from revseg import ReversibleSequence",
            [
                "triton",
                "revseg.layers",
                "revseg.models",
                "revseg.ops",
                "revseg.kernels",
                "PIL",
                "matplotlib",
                "rich",
            ],
        ),
        ("import revseg.data", ["PIL", "cv2"]),
    ],
)
def test_imports_are_light(statement, absent):
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_file_opens_with_its_idea():
    for path in modules():
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc, f"{path.relative_to(ROOT)} has no docstring"


def test_the_face_hands_on_the_public_names():
    import revseg

    for name in revseg.__all__:
        assert getattr(revseg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = revseg.nothing
