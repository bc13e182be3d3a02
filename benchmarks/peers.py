"""Installs the libraries we compare with, and ONNX with its runtime, into a folder of their own.

They are old and ask for old versions of torch, so they are installed without dependencies and
lie last on the path: the torch that is measured stays the one that is installed.

    python -m benchmarks.peers
"""

import subprocess
import sys
from importlib.util import find_spec

from benchmarks.rivals import PEERS

PACKAGES = ["memcnn==1.5.2", "revtorch==0.2.4", "revlib==1.7.2", "FrEIA==0.2", "invtorch==0.5.0"]
ONNX = ["onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0", "onnx_ir==1.1.0", "ml_dtypes==0.6.0"]
ONNX += ["protobuf==7.36.2", "flatbuffers==25.12.19"]
NEEDED = ("scipy", "packaging")  # by memcnn, and by onnxscript


def main() -> None:
    packages = [*PACKAGES, *ONNX, *(name for name in NEEDED if not find_spec(name))]
    command = ["pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(PEERS), *packages]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (PEERS / ".gitignore").write_text("*\n")
    print(f"installed {', '.join(packages)} in {PEERS}")


if __name__ == "__main__":
    main()
