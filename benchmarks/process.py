"""A function in a process of its own: what it leaves in memory, or that it never ends, harms no other.

Values come back line by line, so those of a process that crashes are kept up to the crash.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = "value: "  # before what is a value and not a word of some library


def run(
    function: Callable[..., Iterator[Any]],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> tuple[list[Any], str]:
    """What a generator function yields, and what went wrong; nothing did where that is empty.

    Args:
        function: Of a module, where the process finds it by name.
        arguments: For the function; they and what it yields pass through JSON.
        environment: Of the process; by default that of this one.
        limit: Seconds after which the process is killed.
    """
    job = [function.__module__, function.__name__, json.dumps(arguments)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.process", *job]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        text, _ = process.communicate(timeout=limit)
        end = f"the process ended with {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        end = f"the process took more than {limit} s"
    return [json.loads(line[len(MARK) :]) for line in text.splitlines() if line.startswith(MARK)], end


def main() -> None:
    module, name, arguments = sys.argv[1:]
    for value in getattr(import_module(module), name)(*json.loads(arguments)):
        print(MARK + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
