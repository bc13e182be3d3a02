"""The libraries we compare with, and ONNX with its runtime, in a folder of their own.

They are old and ask for old versions of torch, so they are installed without dependencies and
lie last on the path: the torch that is measured stays the one that is installed.

    python -m benchmarks.peers
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent / ".peers"
MISSING = "not installed: python -m benchmarks.peers"

# The modules of packages, by the packages' names.
PEERS = {
    **{name: name for name in ("memcnn", "revtorch", "revlib", "invtorch", "FrEIA", "momentumnet")},
    "torch-remat": "torch_remat",
}
EXPORT = {name: name for name in ("onnx", "onnxscript", "onnxruntime")}

PACKAGES = ["memcnn==1.5.2", "revtorch==0.2.4", "revlib==1.7.2", "FrEIA==0.2", "invtorch==0.5.0"]
PACKAGES += ["momentumnet==0.10", "torch-remat==0.2.2"]
ONNX = ["onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0", "onnx_ir==1.1.0", "ml_dtypes==0.6.0"]
ONNX += ["protobuf==7.36.2", "flatbuffers==25.12.19"]
NEEDED = ("scipy", "packaging")  # by memcnn, and by onnxscript


def add_peers() -> None:
    """Makes what is installed here importable; last on the path, it replaces nothing."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def is_installed(package: str) -> bool:
    """Whether a key of `PEERS` or `EXPORT` can be imported."""
    add_peers()
    return find_spec((PEERS | EXPORT)[package]) is not None


def main() -> None:
    packages = [*PACKAGES, *ONNX, *(name for name in NEEDED if not find_spec(name))]
    command = ["pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(FOLDER), *packages]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (FOLDER / ".gitignore").write_text("*\n")
    print(f"installed {', '.join(packages)} in {FOLDER}")


if __name__ == "__main__":
    main()
