"""What is installed is what is in the tree."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import revseg

ROOT = Path(__file__).parents[1]


def test_kernels_are_one_folder_under_two_names():
    listed = subprocess.run(
        ["git", "ls-files", "-s", "revseg/kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert listed.startswith("120000 "), "revseg/kernels must be a symbolic link to ../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow other packages named kernels"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel made from it."""
    folder, tree = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("tree")
    others = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "benchmarks")
    shutil.copytree(
        ROOT, tree, symlinks=True, ignore=others, dirs_exist_ok=True
    )  # another process builds too
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    return (*folder.glob("*.tar.gz"), *folder.glob("*.whl"))


def test_the_wheel_made_from_the_source_distribution_holds_every_module(built):
    source, wheel = built
    packed = set(zipfile.ZipFile(wheel).namelist())
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


def test_both_carry_the_licence(built):
    source, wheel = built
    text = (ROOT / "LICENSE").read_text()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(name).decode() == text
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert "\nLicense-Expression: MIT\n" in archive.read(name).decode()
    with tarfile.open(source) as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("/LICENSE")]
        assert archive.extractfile(name).read().decode() == text


@pytest.mark.parametrize("kind", ["tar.gz", "whl"])
def test_it_is_installed_into_an_empty_environment(built, kind, tmp_path):
    """By the Python that runs the tests, which `make test-oldest` and `make test-newest` choose."""
    venv.create(tmp_path, with_pip=False)
    python, script = tmp_path / "bin" / "python", tmp_path / "bin" / "revseg"
    outside = {
        **os.environ,
        "PYTHONPATH": sysconfig.get_path("purelib"),
    }  # setuptools, torch: GBs not loaded here

    def output_of(*command, **more):
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, **{"env": outside, **more}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    (package,) = (path for path in built if path.name.endswith(kind))
    pip = ["-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", "--no-build-isolation"]
    output_of(sys.executable, *pip, str(package))
    empty = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert output_of(script, "--version", env=empty) == f"revseg {revseg.__version__}"
    code = "import revseg, revseg.kernels; from revseg import Recompute, create_model; print(revseg.__file__)"
    assert Path(output_of(python, "-c", code)).is_relative_to(tmp_path)
    assert Path(output_of(python, "-c", "import revseg; print(revseg.__file__)", env=empty)).is_relative_to(
        tmp_path
    )


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


def test_make_says_what_there_is_and_runs_a_folder():
    def make(*words):
        return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert re.findall(r"^  make ([\w-]+)", make("help"), re.MULTILINE) == targets
    everything, engine = make("-n", "test"), make("-n", "test", "FOLDER=engine")
    assert "tests/interpreted" in everything
    assert "tests/engine" not in everything
    assert "tests/engine" in engine
    assert "tests/interpreted" not in engine
