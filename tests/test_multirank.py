"""The helper that runs tests on many ranks: results come back by rank, failures name the rank, a hang ends with nothing left running."""

import time
from pathlib import Path

import pytest
from multirank import run_ranks
from processes import runs

REDUCE = """
import os, torch, torch.distributed as dist
if __name__ == "__main__":
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} sees {total.item():g}, threads {os.environ['OMP_NUM_THREADS']}")
    dist.destroy_process_group()
"""


def _script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_ranks_talk_and_their_output_comes_back_in_rank_order(tmp_path: Path) -> None:
    result = run_ranks(_script(tmp_path, REDUCE), 2, timeout=120)
    assert result.stdout.splitlines() == [f"rank {rank} of 2 sees 3, threads 1" for rank in (0, 1)]


def test_a_failing_rank_is_named_with_what_it_wrote(tmp_path: Path) -> None:
    script = _script(tmp_path, "import os\nif os.environ['RANK'] == '1':\n    raise SystemExit('the wheel fell off')\n")
    with pytest.raises(AssertionError, match=r"(?s)rank 1, stderr ---\nthe wheel fell off"):
        run_ranks(script, 2, timeout=120)


def test_a_hanging_launch_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = _script(tmp_path, f"import os, time\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(600)\n")
    started = time.monotonic()
    with pytest.raises(AssertionError, match="ran past 20 s"):
        run_ranks(script, 2, timeout=20)
    assert time.monotonic() - started < 60
    left = [int(line) for line in pids.read_text().split()]
    assert len(left) == 2
    assert not any(runs(pid) for pid in left)
