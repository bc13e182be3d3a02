"""The command line: parses, calls a command, and says in one sentence what went wrong.

Importing torch takes seconds. So the flags come from dataclasses in `revseg.training.settings`, and the
file of a command is imported only when its arguments are known to be right.

Exit codes: 0 done, 1 the run failed, 2 the user can put it right, 130 interrupted.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from revseg.training.settings import DoctorSettings, TrainSettings

COMMANDS: dict[str, tuple[type, str]] = {  # settings, and the function module:name that takes them
    "train": (TrainSettings, "revseg.commands.train:train"),
    "doctor": (DoctorSettings, "revseg.commands.doctor:doctor"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code.

    Args:
        arguments: The words after `revseg`; those of the process by default.

    Raises:
        SystemExit: With code 0 after `--help`, with code 2 if the arguments are wrong.
    """
    try:
        import tyro
    except ImportError:
        return _fail("the command line needs more packages: pip install 'revseg[train]'", 2)
    settings = tyro.extras.subcommand_cli_from_dict(
        {name: settings for name, (settings, _) in COMMANDS.items()},
        prog="revseg",
        description="Train segmentation networks whose activations do not fit.",
        args=arguments,
    )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks to stderr
    try:
        if isinstance(settings, TrainSettings):
            settings.check_folders()
        module, function = next(run for kind, run in COMMANDS.values() if kind is type(settings)).split(":")
        getattr(importlib.import_module(module), function)(settings)
    except KeyboardInterrupt:
        return _fail("interrupted; if an epoch was finished, --resume continues after it", 130)
    except ImportError as error:
        if (error.name or "").startswith("revseg"):
            raise
        return _fail(f"{error}; the commands need: pip install 'revseg[train]'", 2)
    except (ValueError, OSError) as error:
        return _fail(_sentence(error), 2)
    except RuntimeError as error:
        if type(error).__module__.partition(".")[0] != "revseg":
            raise  # a bug, or a failure of torch: the traceback says more
        return _fail(str(error), 1)
    return 0


def _sentence(error: Exception) -> str:
    """The message on one line; of an error in a process that loads samples, the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith("Caught "):  # torch puts the traceback of the process into the message
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines)


def _fail(message: str, code: int) -> int:
    print(f"revseg: {message}", file=sys.stderr)
    return code
