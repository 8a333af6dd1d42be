"""Law 1 at full size, without memory: the modules of every published model hold, at tp 1 to 8, exactly the tensors that the rules read and write.

That the rules' Hugging Face side is transformers' own index is held in tests/families.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prism import families

TP = {"smollm3-3b-base": (1, 2, 4)}
"""tensor-parallel sizes that the heads allow, where not 1, 2, 4 and 8"""


@pytest.mark.slow
def test_every_tensor_of_a_published_model_is_built_and_known():
    sizes = {name: TP.get(name, (1, 2, 4, 8)) for name in families.PUBLISHED}
    words = [f"{name}:{','.join(map(str, chosen))}" for name, chosen in sizes.items()]
    command = [sys.executable, str(Path(__file__).parent / "true_shapes.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("holds what the rules say") == sum(2 * len(chosen) - 1 for chosen in sizes.values())
