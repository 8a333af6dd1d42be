"""Started on N ranks: trains each case of a JSON file in one launch, and keeps what each rank was told where one is refused.

refusal_ranks.py CASES.json    as laws/layout_runs.py; the words of a UserError go to FOLDER/NAME.RANK, "" where there was none
"""

import json
import os
import sys
import time
from pathlib import Path

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, parallel
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError


def main() -> None:
    """Run every case in turn."""
    folder = Path(sys.argv[1]).parent
    plan = json.loads(Path(sys.argv[1]).read_text())
    for name, case in plan["cases"].items():
        words, begun = "", time.monotonic()
        try:
            loop.train(load_recipe(None, [*plan["common"], *case["set"]], TrainConfig))
        except UserError as error:
            words = str(error)
        record = {"words": words, "seconds": time.monotonic() - begun}
        (folder / f"{name}.{os.environ['RANK']}").write_text(json.dumps(record))
    parallel.stop()


if __name__ == "__main__":
    main()
