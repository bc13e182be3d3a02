"""`python -m revseg` is the command `revseg`."""

import sys

from revseg.cli import main

sys.exit(main())
