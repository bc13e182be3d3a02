"""Imports go down: the picture of the house, held by a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from revseg import ops

ROOT = Path(__file__).parents[1]

FLOORS = [  # the lowest first; a folder or file imports from floors below its own, or from its own folder
    {"__version__", "kernels", "files", "tensors"},
    {"ops", "data", "metrics", "replay"},
    {"engine", "losses"},
    {"couplings", "layers", "exact", "lovasz"},
    {"sequence"},
    {"convert"},
    {"memory"},
    {"models", "testing"},
    {"training", "inference"},
    {"commands"},
]
FACES = ("__init__", "__main__", "cli")  # import from everywhere, and nothing imports them
FOLDERS = {"benchmarks": ("benchmarks", "benchmarks.questions", "benchmarks.gpu")}  # whose files are named
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules() -> list[Path]:
    below = ROOT / "revseg" / "kernels"
    return sorted(path for path in (ROOT / "revseg").rglob("*.py") if below not in path.parents)


def part(module: str) -> str:
    """The name under revseg that a dotted module name belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path, package: str = "revseg") -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in FOLDERS.get(package, (package,)):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name == package or name.startswith(f"{package}.")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = path.relative_to(ROOT / "revseg").with_suffix("").parts[0]
    if here in FACES:
        return
    assert here in LEVEL, f"give revseg/{here} a line in FLOORS"
    for name in imports(path):
        there = part(name)
        if there != here:
            assert there in LEVEL, f"{path.name} imports {name}"
            assert LEVEL[there] < LEVEL[here], f"{path.name} imports {name}, which is not below it"


BENCHMARKS = [  # of files and folders of benchmarks/; a file called __main__ is a face and stands above all
    {"peers", "process", "architectures"},
    {"record"},
    {
        "tables",
        "picture",
        "timing",
        "functions",
        "rivals",
        "segmentation",
        "nets",
        "ahead",
        "ahead_cases",
        "compiling",
    },
    {"ways", "inference"},
    {"workload", "scenarios", "micro"},
    {"gradients", "network_ways"},
    {"any_network_ways"},
    {"questions"},
    {"first_table", "paper"},
    {"gpu", "measure", "report", "paired"},
    {"__main__"},
]


def test_imports_go_down_in_the_benchmarks_and_not_in_circles():
    level = {name: i for i, names in enumerate(BENCHMARKS) for name in names}
    graph: dict[str, set[str]] = {}
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        parts = path.relative_to(ROOT / "benchmarks").with_suffix("").parts
        here = "__main__" if parts[-1] == "__main__" else parts[0]
        if parts == ("__init__",) or parts[0].startswith("."):  # where the rivals are installed
            continue
        assert here in level, f"give benchmarks/{here} a line in BENCHMARKS"
        module = ".".join(("benchmarks", *parts)).removesuffix(".__init__")
        graph[module] = imports(path, "benchmarks") - {"benchmarks"}
        for name in graph[module]:
            there = name.split(".")[1]
            if there != here and there != parts[0]:
                assert level[there] < level[here], f"{module} imports {name}, which is not below it"
        assert len(path.read_text().splitlines()) <= 300, f"{module} tells two stories"
    assert_no_circle(graph)


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    """Takes away what imports nothing that is left, until nothing is left."""
    left = {name: {other for other in found if other in graph} - {name} for name, found in graph.items()}
    while left:
        free = {name for name, found in left.items() if not found & left.keys()}
        assert free, f"these import each other: {', '.join(sorted(left))}"
        left = {name: found for name, found in left.items() if name not in free}


def test_a_circle_is_found():
    assert_no_circle({"a": {"b"}, "b": set()})
    with pytest.raises(AssertionError, match="import each other: a, b"):
        assert_no_circle({"a": {"b"}, "b": {"a", "c"}, "c": set()})


KERNEL_FLOORS = [  # inside of kernels; a folder without a line here is an operation
    {"shapes", "precision", "strides", "interpolation"},
    {"norm", "dispatch"},
    {"verify"},
    {"cpu", "gpu"},
    {"an operation"},
    {"registry"},
]
KERNEL_LEVEL = {name: level for level, names in enumerate(KERNEL_FLOORS) for name in names}


def kernel_imports() -> dict[str, set[str]]:
    """For each file or folder of kernels those that it imports from."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "kernels").rglob("*.py"):
        here = path.relative_to(ROOT / "kernels").with_suffix("").parts[0]
        names = imports(path)
        assert all(part(name) == "kernels" for name in names), f"{path} imports from outside of kernels"
        found.setdefault(here, set()).update(name.split(".")[2] for name in names)
    return found


def test_imports_go_down_inside_of_kernels():
    def level(name: str) -> int:
        return KERNEL_LEVEL.get(name, KERNEL_LEVEL["an operation"])

    found = kernel_imports()
    for here, names in found.items():
        for there in names - {here}:
            of_operations = level(here) == level(there) == KERNEL_LEVEL["an operation"]
            assert level(there) < level(here) or of_operations, f"kernels/{here} imports {there}"
    assert_no_circle(found)


def test_the_door_to_kernels_is_ops():
    doors = [ROOT / "revseg" / "ops.py", ROOT / "revseg" / "commands" / "doctor.py"]
    for path in (*modules(), *(ROOT / "benchmarks").rglob("*.py")):
        if path not in doors and ".peers" not in path.parts:  # other libraries, where they are installed
            assert all(part(name) != "kernels" for name in imports(path)), f"{path} imports from kernels"


def test_the_door_hands_on_what_its_types_say():
    tree = ast.parse((ROOT / "revseg" / "ops.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"revseg.kernels.{home}" for name, home in ops._HOME.items()}
    assert all(getattr(ops, name) is not None for name in ops.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ops.nothing


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
        ("import revseg.ops", ["torch"]),
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
