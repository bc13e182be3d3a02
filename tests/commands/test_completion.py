"""`revseg completion`: what a shell that has read the script offers."""

import subprocess

import pytest

from revseg.cli import main
from revseg.commands import COMMANDS
from revseg.models import list_models
from tests.helpers import refused


@pytest.fixture
def offered(capsys, tmp_path):
    """The words that bash offers for the last of these."""
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def offered(*words):
        quoted = " ".join(f"'{word}'" for word in ("revseg", *words))
        asked = f'{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _revseg; printf "%s\\n" "${{COMPREPLY[@]}}"'
        result = subprocess.run(
            ["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert not result.stderr
        return result.stdout.split()

    return offered


def test_commands_of_one_word_and_two(offered):
    assert set(offered("")) == {name.split()[0] for name in COMMANDS}
    assert offered("ev") == ["evaluate"]
    assert offered("data", "ch") == ["check"]


def test_flags_and_their_values(offered):
    assert offered("train", "--lr") == ["--lr"]
    assert "--root" in offered("data", "check", "--")
    assert offered("data", "check", "--epochs") == []
    assert offered("train", "--model", "") == list_models()
    assert offered("train", "--precision", "b") == ["bfloat16"]
    assert offered("predict", "--runtime", "o") == ["onnx"]


def test_files_where_no_name_is_meant(offered, tmp_path):
    (tmp_path / "weights.safetensors").touch()
    assert offered("predict", "wei") == ["weights.safetensors"]


def test_another_shell(capsys):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit && bashcompinit\n_revseg() {")
    assert "expected one of the shells bash, zsh, got csh" in refused(capsys, "completion", "csh")
