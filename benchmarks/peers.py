"""Installs the libraries we compare with, into a folder of their own.

They are old and ask for old versions of torch, so they are installed without dependencies and
lie last on the path: the torch that is measured stays the one that is installed.

    python -m benchmarks.peers
"""

import subprocess
import sys
from importlib.util import find_spec

from benchmarks.rivals import PEERS

PACKAGES = ["memcnn==1.5.2", "revtorch==0.2.4", "revlib==1.7.2", "FrEIA==0.2", "invtorch==0.5.0"]


def main() -> None:
    packages = PACKAGES if find_spec("scipy") else [*PACKAGES, "scipy"]  # memcnn imports it
    command = ["pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(PEERS), *packages]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (PEERS / ".gitignore").write_text("*\n")
    print(f"installed {', '.join(packages)} in {PEERS}")


if __name__ == "__main__":
    main()
