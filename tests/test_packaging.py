"""What is installed is what is in the tree."""

import os
import re
import shlex
import shutil
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


def test_the_lines_of_the_dockerfile_work_without_an_engine(tmp_path):
    """What it copies is there and is enough to build from; what it installs can be asked for."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for words in (line.split()[1:] for line in lines if line.startswith("COPY ")):
        for name in words[:-1]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tmp_path / words[-1], symlinks=True)
            else:
                shutil.copy(ROOT / name, tmp_path / words[-1])
    (run,) = (line.removeprefix("RUN ") for line in lines if line.startswith("RUN "))
    command = [
        sys.executable,
        *shlex.split(run)[1:],
        "--dry-run",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "does not provide the extra" not in result.stderr
    assert 'ENTRYPOINT ["revseg"]' in lines  # the script of pyproject.toml


def test_a_release_is_checked_before_it_is_made(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    def check():
        command = [".ci/release", "7.8.9", "--check"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    for name in ("revseg/__init__.py", "CITATION.cff", "CHANGELOG.md", "pyproject.toml", ".ci/release"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git("init", "--quiet")
    assert "not released: the work tree has changes" in check().stderr
    for name, words in (
        ("revseg/__init__.py", '__version__ = "{}"'),
        ("pyproject.toml", 'version = "{}"'),
        ("CITATION.cff", "version: {}"),
        ("CHANGELOG.md", "## [{}]"),
    ):
        git("add", "--all")
        git("commit", "--quiet", "--message", "before")
        assert f"not released: {name} " in check().stderr
        path, old = tmp_path / name, "Unreleased" if name == "CHANGELOG.md" else "0.1.0"
        assert words.format(old) in path.read_text()
        path.write_text(path.read_text().replace(words.format(old), words.format("7.8.9")))
    git("add", "--all")
    git("commit", "--quiet", "--message", "release")
    assert check().stdout == "7.8.9 may be released\n"
    git("tag", "v7.8.9")
    assert "not released: v7.8.9 exists" in check().stderr
