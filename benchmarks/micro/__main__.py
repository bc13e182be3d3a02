"""The parts of a step one by one: `python -m benchmarks measure micro`, by a shorter name.

python -m benchmarks.micro --rounds 20
"""

import sys

from benchmarks import measure

if __name__ == "__main__":
    measure.ask("micro", sys.argv[1:])
