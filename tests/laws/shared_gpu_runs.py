"""`layout_runs.py` for ranks that share one GPU. With SHARED_GPU_HOST_TOO=1, tensors of the host are moved as those of a GPU would be."""

import os

import shared_gpu

shared_gpu.share(host_too=os.environ.get("SHARED_GPU_HOST_TOO") == "1")

from laws import layout_runs  # noqa: E402

if __name__ == "__main__":
    layout_runs.main()
