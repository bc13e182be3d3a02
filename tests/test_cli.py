import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

from revseg.cli import _parsed, main, spelled_out
from revseg.commands import COMMANDS, named
from revseg.data import list_datasets
from revseg.models import list_models
from revseg.training import loop, results, run
from revseg.training.checkpoint import load_checkpoint, save_checkpoint
from revseg.training.choices import registered_names
from revseg.training.folder import DivergedError
from revseg.training.settings import OUTPUTS, TrainSettings
from tests.helpers import refused

ROOT = Path(__file__).parents[1]
SMALL = ["--model-args", "widths=4,8,16", "--threads", "1"]
SHORT = ["--train-samples", "4", "--val-samples", "2", "--batch", "2", "--epochs", "1"]
TINY = ["train", "--size", "64", "128", *SHORT, *SMALL]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Leaves out measuring memory; the end-to-end test, in a process of its own, has it."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(results, "predict_both", lambda *_: {"reversible": 1, "saved": 2})
    monkeypatch.setattr(results, "compare_memory", lambda *_: {"reversible": 1, "saved": 2})
    monkeypatch.setattr(run, "predicted_peak", lambda *_: None)
    yield
    torch.set_num_threads(threads)


def process(*arguments, cwd, code=None):
    """The command in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "revseg"]), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_end_to_end_in_a_process(tmp_path):
    result = process(*TINY, "--out", "runs/x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "runs/x")) == [".lock", *sorted(OUTPUTS)]
    assert "epoch 1/1  loss" in result.stdout
    assert "Peak memory of a training step" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["data", "check", "--help"], 0),
        (["train", "--epoch", "3"], 2),
        (["train", "--batch", "0"], 2),
    ],
)
def test_arguments_are_answered_without_torch(arguments, code, tmp_path):
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from revseg.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    result = process(*arguments, cwd=tmp_path, code=program)
    assert result.returncode == code
    assert result.stdout.splitlines()[-1] == "False"
    assert "Traceback" not in result.stderr


def test_a_signal_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    real = loop.make_step

    def make_step(*args):
        os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", make_step)
        assert main([*TINY, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "revseg: stopped by SIGINT; saved at epoch 1, step 1: --resume goes on from there"
    ]
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0  # with the settings of the run
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [1]


def test_help_version_and_unknown_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("revseg 0.")
    assert main(["--help"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in COMMANDS)
    assert main(["data", "--help"]) == 0
    assert "data check" in capsys.readouterr().out
    assert "unknown command 'data chek'; did you mean data check?" in refused(capsys, "data", "chek")
    for words in (["bogus"], ["bogus", "--help"], ["data"], []):
        assert main(words) == 2
    assert "unknown command 'docter'; did you mean doctor?" in refused(capsys, "docter")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in (*list_models(), *list_datasets()))


def test_names_are_those_of_the_registries():
    assert list(registered_names("models", "MODELS")) == list_models()
    assert list(registered_names("data", "DATASETS")) == list_datasets()


def test_help_into_a_closed_pipe_is_silent(tmp_path):
    command = f"{sys.executable} -m revseg train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_home_folder_is_spelled_out():
    assert TrainSettings(out="~/runs").out == Path.home() / "runs"


def test_a_folder_may_be_called_like_markup(tmp_path):
    assert main([*TINY, "--out", str(tmp_path / "x[/y]")]) == 0
    assert (tmp_path / "x[/y]" / "summary.json").exists()


@pytest.mark.parametrize(
    "words", [["--size", "48x64"], ["--size=48x64"], ["--size", "48", "64"], ["--size", "48,64"]]
)
def test_ways_to_write_a_size(words):
    assert spelled_out(words, TrainSettings) == ["--size", "48", "64"]


def test_settings_come_from_a_file_and_flags_count_more(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "size: [32, 64]\nlr: 5e-3\nmodel-args: {widths: [4, 8, 16]}\ntrain_samples: 4\nepochs: 7\nout: ~/x"
    )
    words = ["--config", str(path), "--epochs", "3"]
    settings = _parsed("train", TrainSettings, words)
    assert (settings.size, settings.lr, settings.epochs) == ((32, 64), 5e-3, 3)
    assert (settings.model_args, settings.out) == (("widths=[4, 8, 16]",), Path.home() / "x")
    for text, message in (
        ("learning_rate: 1", f"unknown key 'learning_rate' in {path}; did you mean lr?"),
        ("batch_size: 1", f"unknown key 'batch_size' in {path}; did you mean batch?"),
        ("batch: many", f"expected batch in {path} to be int, got 'many'"),
        ("epochs: 0", f"{path}: expected --epochs of at least 1, got 0"),
        ("model: vnett", f"{path}: unknown --model 'vnett'; did you mean vnet?"),
        ("- 3", f"expected settings by name in {path}, got list"),
        ("a: [", f"{path} is no YAML"),
    ):
        path.write_text(text)
        assert message in refused(capsys, "train", "--config", path)
    path = tmp_path / "settings.json"
    path.write_text("{")
    assert f"{path} is no JSON: " in refused(capsys, "train", "--config", path)


def test_out_folder_with_a_run_is_not_touched(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("precious")
    message = refused(capsys, *TINY, "--out", tmp_path)
    assert f"{tmp_path} holds results already (log.jsonl), but no last.pt to continue" in message
    (tmp_path / "last.pt").write_text("precious")
    message = refused(capsys, *TINY, "--out", tmp_path)
    assert (
        f"{tmp_path} holds a run already (last.pt): choose another --out, --resume to continue it" in message
    )
    assert (tmp_path / "log.jsonl").read_text() == "precious"


def test_out_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refused(capsys, *TINY, "--out", tmp_path / "file" / "run")
    assert f"cannot write to --out {tmp_path}/file/run: {tmp_path}/file is a file" in message


def test_out_folder_without_permission(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # a chmod would not stop root
    assert f"no permission to write in {tmp_path}" in refused(capsys, *TINY, "--out", tmp_path / "run")


@pytest.mark.parametrize("room", [4_096, 70_000])
def test_full_disk_is_one_sentence_with_the_file_and_the_older_checkpoint_is_good(
    tmp_path, monkeypatch, room
):
    """It was "[enforce fail at inline_container.cc:672]" or "[Errno 28]"; a limit on the size of files acts like a quota."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # its file would be too large, too
    out = tmp_path / "run"
    out.mkdir()
    save_checkpoint(out / "last.pt", {"old": 1})
    program = (
        "import resource, signal, sys\n"
        "from revseg.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "sys.dont_write_bytecode = True  # a module cut off at the limit would stay so\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    result = process(*TINY, "--out", out, "--overwrite", cwd=tmp_path, code=program)
    assert result.returncode == 2
    assert re.fullmatch(
        rf"revseg: cannot write {out}/last.pt: (File too large|No space left on device)\n", result.stderr
    )
    assert load_checkpoint(out / "last.pt")["old"] == 1
    assert sorted(os.listdir(out)) == [".lock", "last.pt"]


def test_resume_without_a_run(tmp_path, capsys):
    assert f"nothing to resume: {tmp_path}/last.pt does not exist" in refused(
        capsys, *TINY, "--out", tmp_path, "--resume"
    )


@pytest.mark.parametrize("content", ["garbage", "truncated", "foreign"])
def test_resume_from_an_unfit_checkpoint(content, tmp_path, capsys):
    path = tmp_path / "last.pt"
    torch.save({"weights": torch.zeros(100)}, path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif content == "garbage":
        path.write_bytes(b"garbage" * 100)
    assert f"{path} is damaged or no checkpoint" in refused(capsys, *TINY, "--out", tmp_path, "--resume")


def test_failed_runs_and_bugs_differ(tmp_path, monkeypatch, capsys):
    def fail_with(error):
        def fail(_):
            raise error

        monkeypatch.setattr("revseg.commands.train.train", fail)
        return main([*TINY, "--out", str(tmp_path / "run")])

    assert fail_with(DivergedError("the loss became nan at step 3")) == 1
    assert capsys.readouterr().err == "revseg: the loss became nan at step 3\n"
    assert fail_with(ModuleNotFoundError("No module named 'safetensors'", name="safetensors")) == 2
    assert "pip install 'revseg[train]'" in capsys.readouterr().err
    for bug in (RuntimeError("a bug"), ModuleNotFoundError("a bug", name="revseg.missing")):
        with pytest.raises(type(bug), match="a bug"):
            fail_with(bug)


def test_every_command_can_be_imported():
    for command in COMMANDS.values():
        assert callable(named(command.function))
        assert is_dataclass(named(command.settings))
