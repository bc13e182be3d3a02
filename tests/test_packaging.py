"""What is installed is what is in the tree."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_kernels_are_one_folder_under_two_names():
    listed = subprocess.run(
        ["git", "ls-files", "-s", "revseg/kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert listed.startswith("120000 "), "revseg/kernels must be a symbolic link to ../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow other packages named kernels"


def test_wheel_made_from_the_source_distribution_holds_every_module(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    (source,) = tmp_path.glob("*.tar.gz")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("revseg/")}
    tree = {
        "revseg/" + str(path.relative_to(ROOT / "revseg"))
        for path in (ROOT / "revseg").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    tree |= {
        f"revseg/{path.relative_to(ROOT)}"
        for path in (ROOT / "kernels").rglob("*.*")
        if path.suffix in (".py", ".md")
    }
    assert tree | {"revseg/py.typed"} <= packed
    with tarfile.open(source) as archive:  # tests need the whole checkout
        assert not [name for name in archive.getnames() if "/tests/" in name]
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "import revseg, revseg.kernels; from revseg import Recompute, create_model; print(revseg.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(tmp_path / "installed" / "revseg" / "__init__.py")


def test_constraints_pin_torch_and_the_range_stays_open():
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    dependencies = re.search(
        r"^dependencies = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )[1]
    assert "==" not in dependencies
    assert "<" not in dependencies
