"""Measures, and makes tables and pictures of what was measured.

python -m benchmarks measure [NAME ...] [options]
python -m benchmarks report [options]

`--help` behind each says more. Beside it: `python -m benchmarks.gpu` on a GPU, `python -m benchmarks.micro` for the
parts of a step, `python -m benchmarks.paired` for two checkouts, `python -m benchmarks.peers` to install the rivals.
"""

import sys

from benchmarks import measure, report

COMMANDS = {"measure": measure.main, "report": report.main}


def main(arguments: list[str]) -> None:
    """Runs the command of these words."""
    if not arguments or arguments[0] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
