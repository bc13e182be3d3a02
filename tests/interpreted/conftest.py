"""Kernels without a GPU: in Triton's interpreter, which has to be chosen before Triton is imported."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]
