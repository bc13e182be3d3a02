"""The command line: parses, calls a command, and says in one sentence what went wrong.

Importing torch takes seconds. So the flags come from dataclasses, those in `revseg.training.settings`
above all, and the file of a command is imported only when its arguments are known to be right.

Exit codes: 0 done, 1 the run failed, 2 the user can put it right, 128 + n stopped by signal n.
"""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from revseg import __version__
from revseg.commands import COMMANDS, named
from revseg.training.choices import meant_setting, nearest, registered_names
from revseg.training.config import starting_settings
from revseg.training.settings import TrainSettings

SIZES = {"--size", "--crop", "--window"}  # flags of a height and a width


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code.

    Args:
        arguments: The words after `revseg`; those of the process by default.

    Raises:
        SystemExit: With code 0 after the `--help` of a command, with code 2 if its arguments are wrong.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except BrokenPipeError:  # `revseg train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        _flush_output()


def _run(words: list[str]) -> int:
    if words and words[0] in ("--version", "-V"):
        print(f"revseg {__version__}")
        return 0
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if name is None:
        return _no_command(words)
    command, words = COMMANDS[name], words[len(name.split()) :]
    try:
        kind = named(command.settings)
        words = spelled_out(words, kind)
        settings = _parsed(name, kind, words)
    except ModuleNotFoundError as error:
        if error.name == "yaml":
            return _fail("--config needs PyYAML: pip install 'revseg[train]'", 2)
        return _fail("the command line needs more packages: pip install 'revseg[train]'", 2)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _fail(sentence(error), 2)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks to stderr
    try:
        if isinstance(settings, TrainSettings):
            settings.check_folders()
        named(command.function)(settings)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        raise
    except ImportError as error:
        if (error.name or "").startswith("revseg"):
            raise
        remedy = "" if "pip install" in str(error) else "; the commands need: pip install 'revseg[train]'"
        return _fail(f"{error}{remedy}", 2)
    except (ValueError, OSError) as error:
        return _fail(sentence(error), 2)
    except RuntimeError as error:
        if type(error).__module__.partition(".")[0] != "revseg":
            raise  # a bug, or a failure of torch: the traceback says more
        return _fail(str(error), int(getattr(error, "exit_code", 1)))
    return 0


def _parsed(name: str, settings: type, words: list[str]) -> Any:
    """The settings that the words of a command say."""
    import tyro

    if settings is not TrainSettings:
        return tyro.cli(settings, prog=f"revseg {name}", args=words)
    networks = ", ".join(registered_names("models", "MODELS"))
    datasets = ", ".join(registered_names("data", "DATASETS"))
    about = f"{settings.__doc__}\n\nNetworks: {networks}.\n\nData sets: {datasets}."
    return tyro.cli(
        settings, prog=f"revseg {name}", description=about, args=words, default=starting_settings(words)
    )


def spelled_out(words: Sequence[str], settings: type) -> list[str]:
    """The words as the parser wants them: `--size 48x64` as two numbers, `--resume` with a value.

    Raises:
        ValueError: If a flag is unknown, with the one that was probably meant.
    """
    flags = {field.name.replace("_", "-") for field in fields(settings)}
    _check_sizes(words)
    result: list[str] = []
    for i, word in enumerate(words):
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            flag = flag.replace("_", "-")
            if flag not in flags and flag.removeprefix("no-") not in flags and flag not in ("help", ""):
                raise ValueError(_unknown_flag(flag, flags))
            result.append(f"--{flag}")
            if equals:
                result += re.split(r"[xX,]", value) if f"--{flag}" in SIZES else [value]
            if flag == "resume" and not equals and (i + 1 == len(words) or words[i + 1].startswith("-")):
                result.append("True")
        elif re.fullmatch(r"\d+[xX,]\d+", word) and result and result[-1] in SIZES:
            result += re.split(r"[xX,]", word)
        else:
            result.append(word)
    return result


def _check_sizes(words: Sequence[str]) -> None:
    """Refuses a size that is not two whole numbers, in words of our own."""
    for flag in SIZES & set(words):
        place = words.index(flag) + 1
        values = [word for word in words[place : place + 2] if not word.startswith("--")]
        numbers = re.split(r"[xX,]", values[0]) if len(values) == 1 or "x" in values[0].lower() else values
        if values != ["None"] and (len(numbers) != 2 or not all(number.isdigit() for number in numbers)):
            raise ValueError(
                f"expected {flag} as height and width, as in 256 512 or 256x512, got {' '.join(values) or 'none'}"
            )


def _unknown_flag(flag: str, flags: set[str]) -> str:
    meant = meant_setting(flag, flags)
    hint = f"did you mean --{meant}?" if meant else "--help lists the flags"
    return f"unknown flag --{flag}; {hint}"


def _no_command(words: Sequence[str]) -> int:
    """What is said without a command, or about one that is none."""
    group = [name for name in COMMANDS if words and name.split()[0] == words[0]]
    asked = words[len(group[:1]) : len(group[:1]) + 1]
    if not asked or asked[0] in ("--help", "-h"):
        print(_listing(group or list(COMMANDS)), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    first = {name.split()[0] for name in COMMANDS}
    choices = group or sorted(first)
    meant = nearest(" ".join(words[: 2 if group else 1]), choices)
    hint = f"did you mean {meant}? " if meant else ""
    said = " ".join(words[:2]) if group else words[0]
    return _fail(f"unknown command {said!r}; {hint}choose one of {', '.join(choices)}", 2)


def _listing(names: Sequence[str]) -> str:
    """What commands there are."""
    lines = [
        "usage: revseg COMMAND [flags]",
        "",
        "Train segmentation networks whose activations do not fit.",
        "",
    ]
    lines += [f"  {name:16} {named(COMMANDS[name].settings).__doc__.splitlines()[0]}" for name in names]
    lines += ["", "revseg COMMAND --help lists the flags of a command, revseg --version says which this is."]
    return "\n".join(lines)


def sentence(error: Exception) -> str:
    """The message on one line; of an error in a process that loads samples, the error itself."""
    if isinstance(error, OSError) and error.strerror:
        about = f": {error.filename}" if error.filename else ""
        return error.strerror + about
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith("Caught "):  # torch puts the traceback of the process into the message
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # the terminal may be gone: then nobody reads it
        print(f"revseg: {message}", file=sys.stderr)
    return code


def _flush_output() -> None:
    """Writes out what is printed, so that a closed pipe shows here and not at the end of the process."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
