"""What follows from each end of a Slurm job: the real script under bash, in a Slurm whose programs are played and fail as real ones do.

A real Slurm ends jobs in test_slurm_loopback.py.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from played_slurm import SCONTROL, play_slurm

from megatron_prism.errors import MachineError
from megatron_prism.launch import slurm
from megatron_prism.launch.cluster import ClusterConfig
from megatron_prism.launch.job import Job

STOPS = 'touch "$PRISM_STOPPED_FILE"; exit 75'
FAILS = "exit 1"
IS_ENDED = "exit 143"
REFUSES = 'echo "no such key" > "$PRISM_ERROR_FILE"; exit 1'
WAITS = "echo $$ > pid; touch started; exec /bin/sleep 600 > /dev/null 2>&1"
ONCE = '[[ -e been ]] || { touch been; echo "Unable to contact slurm controller" >&2; exit 1; }'
CANCELLED = "JobState=COMPLETING Reason=None"
TIMED_OUT = "JobState=COMPLETING Reason=TimeLimit"


def preempted(minutes_ago: int) -> str:
    """What Slurm says of it, in the time of this place."""
    return f"PreemptTime={datetime.now() - timedelta(minutes=minutes_ago):%Y-%m-%dT%H:%M:%S}"


class Played:
    """A job in a folder of its own, which is started as often as a test says. Its output is runs/x."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "runs/x"
        self.output.mkdir(parents=True)

    def start(self, srun: str = FAILS, *, stage: str = "train", number: int = 4711, restarts: int = 0, **more: str) -> subprocess.Popen[str]:
        """One session. srun: what it does; more: programs, `setup` and `requeues` of the cluster file."""
        place = ClusterConfig(setup=more.pop("setup", ""), requeues=int(more.pop("requeues", "3")))
        script = slurm.sbatch_script(Job(stage, Path("x.toml"), ranks=2, nodes=2), place, "x", Path("runs/x"))
        env = {**os.environ, **play_slurm(self.folder / "bin", nodes=2, srun=srun, **more), "SLURM_JOB_ID": str(number)}
        env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        (self.folder / "script").write_text(script)
        return subprocess.Popen(["bash", "script"], env=env, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def end(self, srun: str = FAILS, **more: object) -> tuple[int, str]:
        """One session to its end: its status, and what it said."""
        session = self.start(srun, **more)  # type: ignore[arg-type]
        said, _ = session.communicate(timeout=60)
        return session.returncode, said

    def end_from_outside(self, state: str) -> tuple[int, str]:
        """A session in which Slurm tells the script to end, and what Slurm then knows of the job."""
        (self.folder / "started").unlink(missing_ok=True)
        session = self.start(WAITS)
        self.wait_for("started")
        (self.folder / "state").write_text(state)
        session.send_signal(signal.SIGTERM)
        said, _ = session.communicate(timeout=60)
        os.kill(int((self.folder / "pid").read_text()), signal.SIGKILL)  # as Slurm ends what is left of a job
        (self.folder / "state").unlink()
        return session.returncode, said

    def wait_for(self, name: str) -> None:
        """Until a session has made this file."""
        end = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < end
            time.sleep(0.02)

    def save(self, step: int) -> None:
        """A complete checkpoint."""
        mark = self.output / f"checkpoints/step_{step:08d}/COMPLETE"
        mark.parent.mkdir(parents=True)
        mark.touch()

    @property
    def requeued(self) -> int:
        """How often the job was queued again."""
        return self._lines("requeued")

    @property
    def updated(self) -> list[str]:
        """When it may start again, each time that this was said."""
        return (self.folder / "updated").read_text().split()

    def _lines(self, name: str) -> int:
        path = self.folder / name
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def job(tmp_path: Path) -> Played:
    return Played(tmp_path)


# --- failures and progress ---------------------------------------------------------------------------------------------------------------------


def test_what_fails_without_progress_starts_later_each_time_and_is_given_up_and_a_new_checkpoint_is_progress(job: Played) -> None:
    for _ in range(3):
        job.end()
    assert job.requeued == 3 and job.updated == ["StartTime=now+10minutes", "StartTime=now+20minutes"]
    job.save(4)
    job.save(8)
    (job.output / "checkpoints/step_00000012.damaged-1").mkdir()
    (job.output / "checkpoints/step_00000012.damaged-1/COMPLETE").touch()
    said = [job.end()[1] for _ in range(4)]
    assert job.requeued == 6
    assert "status 1 at step 8: failure 1 without progress, of 4 that end this job" in said[0], "what was set aside is no checkpoint"
    assert "error: given up: mend what is said above, and submit it again" in said[3] and "given up" not in said[2]


def test_a_checkpoint_that_is_lost_and_made_again_is_no_progress(job: Played) -> None:
    job.save(8)
    job.end()
    (job.output / "checkpoints/step_00000008/COMPLETE").unlink()
    job.end()
    job.save(9)
    (job.output / "checkpoints/step_00000009/COMPLETE").rename(job.output / "checkpoints/step_00000008/COMPLETE")
    assert "failure 3 without progress" in job.end()[1]


def test_a_stage_without_checkpoints_reaches_its_time_limit_as_often_as_its_output_grows(job: Played) -> None:
    draws = 'echo "one more session" >> runs/x/responses; echo "$RANDOM$RANDOM" > runs/x/provenance.json; ' + IS_ENDED
    for _ in range(9):
        status, _ = job.end(draws, stage="prompts")
        assert status == 143
    assert job.requeued == 9, "nine days of a stage that goes on where it was"
    begins_anew = 'echo "$RANDOM$RANDOM$RANDOM" >> runs/x/provenance.json; ' + IS_ENDED
    said = [job.end(begins_anew, stage="prompts")[1] for _ in range(3)]
    assert job.requeued == 11 and "given up" in said[-1]


def test_what_grows_in_an_output_at_each_failing_start_is_no_progress(job: Played) -> None:
    begins = "mkdir -p runs/x/wandb runs/x/tensorboard runs/x/servers; for name in generation.log servers/0.log part.tmp wandb/a tensorboard/b "
    for _ in range(4):
        _, said = job.end(begins + 'trackers.json provenance.json; do echo "one more start" >> runs/x/$name; done; exit 1', stage="evaluate")
    assert job.requeued == 3 and "given up" in said


def test_a_stage_whose_every_start_fails_is_given_up_whatever_its_output_grows_by(job: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    grows = "echo more >> runs/x/notes; exit 1"
    said = [job.end(grows, stage="evaluate", requeues="1")[1] for _ in range(11)]
    assert job.requeued == 10 and "given up" not in said[9]
    assert "and 11 failures within an hour of a start, whatever the output grew by" in said[10] and "given up" in said[10]
    monkeypatch.setenv("SECONDS", "3600")  # of this job's shell: how long ago it began
    for _ in range(12):
        job.end(grows, stage="evaluate", requeues="1", number=4712)
    assert job.requeued == 22, "short time limits do not end a stage that goes on where it was"


def test_a_training_whose_log_alone_grows_makes_no_progress(job: Played) -> None:
    for _ in range(4):
        status, said = job.end('echo "step 1" >> runs/x/metrics.jsonl; exit 1')
    assert job.requeued == 3 and "given up" in said and status == 1


def test_who_was_told_to_stop_or_makes_room_for_others_has_not_failed(job: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(6):
        assert job.end(STOPS)[0] == 75
    (job.folder / "state").write_text(f"JobState=RUNNING Reason=None {preempted(0)}")
    as_the_user_likes = '[[ "$*" != *"show job"* || ${SLURM_TIME_FORMAT:-standard} == standard ]] || rm -f state\n'
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    for _ in range(6):
        assert job.end(IS_ENDED, scontrol=as_the_user_likes + SCONTROL)[0] == 143
    assert job.requeued == 12 and not (job.folder / "runs/x.failures").exists()


def test_a_stage_that_ends_well_before_its_work_is_done_is_75_and_counts(job: Played) -> None:
    said = [job.end("exit 0") for _ in range(4)]
    assert job.requeued == 3 and {status for status, _ in said} == {75} and "given up" in said[-1][1]
    (job.output / "COMPLETE").touch()
    assert job.end("exit 0") == (0, "")
    assert job.requeued == 3


# --- bad input ---------------------------------------------------------------------------------------------------------------------------------


def test_bad_input_ends_a_job_that_has_done_nothing_at_once(job: Played) -> None:
    assert job.end(REFUSES) == (2, "")
    assert job.requeued == 0 and sorted(path.name for path in (job.folder / "runs").iterdir()) == ["x", "x.job"]


@pytest.mark.parametrize("restarts", [0, 1])
def test_what_is_refused_after_something_was_done_may_pass_and_counts_as_a_failure(job: Played, restarts: int) -> None:
    if not restarts:
        job.save(4)
    said = [job.end(REFUSES, scontrol=SCONTROL.replace("echo 0", f"echo {restarts}"), restarts=restarts) for _ in range(4)]
    assert job.requeued == 3 and {status for status, _ in said} == {2} and "given up" in said[-1][1]


def test_what_would_come_to_the_same_for_certain_is_never_queued_again(job: Played) -> None:
    job.save(4)
    assert job.end('touch "$PRISM_ERROR_FILE.never"; ' + REFUSES) == (2, "")
    assert job.requeued == 0 and not list((job.folder / "runs").glob("*.error*"))


# --- one job at a time -------------------------------------------------------------------------------------------------------------------------


def test_a_second_job_on_an_output_ends_at_once_and_the_first_is_still_queued_again(job: Played) -> None:
    first = job.start("touch started; while [[ ! -e go ]]; do /bin/sleep 0.02; done; " + STOPS)
    job.wait_for("started")
    alive = '[[ "$*" != *--jobs=4711* ]] || echo 4711'
    status, said = job.end("touch ran", number=4712, squeue=alive)
    assert status == 2 and "error: job 4711 makes runs/x already; scancel it first" in said and not (job.folder / "ran").exists()
    refused = 'echo "in use" > "$PRISM_ERROR_FILE"; touch refused; while [[ ! -e go_too ]]; do /bin/sleep 0.02; done; exit 1'
    past_that = job.start(refused, number=4713, squeue='echo "Unable to contact slurm controller" >&2; exit 1')
    job.wait_for("refused")
    (job.folder / "go").touch()
    first.communicate(timeout=60)
    assert first.returncode == 75 and (job.folder / "requeued").read_text() == "4711\n", "what another job was refused is not its own"
    (job.folder / "go_too").touch()
    past_that.communicate(timeout=60)
    assert past_that.returncode == 2 and job.requeued == 1
    assert (job.folder / "runs/x.job").read_text() == "4711\n", "it does not know that the other one is gone"


def test_the_failures_of_another_job_are_not_this_jobs(job: Played) -> None:
    for number in (1, 2, 3, 4, 5):
        gone = "" if number % 2 == 0 else 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
        assert "failure 1 without progress" in job.end(number=number, squeue=gone)[1]
    assert (job.folder / "runs/x.job").read_text() == "5\n", "whoever runs now is the one to wait for"


def test_a_full_disk_does_not_take_the_number_of_the_job_that_makes_an_output(job: Played) -> None:
    number, beside = job.folder / "runs/x.job", job.folder / "runs/x.job.tmp"
    number.write_text("4711\n")
    before = number.stat()
    job.end()
    assert (number.stat().st_ino, number.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "what is right is not written again"
    beside.symlink_to("/dev/full")
    job.end(number=4712)
    assert number.read_text() == "4711\n", "what cannot be written whole is not written"
    beside.unlink()
    job.end(number=4712)
    assert number.read_text() == "4712\n" and not beside.exists()


@pytest.mark.parametrize("text", ["", "\n", "47 11"])
def test_a_number_that_was_cut_short_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "x.job").write_text(text)
    asked = play_slurm(tmp_path / "bin", nodes=1, squeue="echo 1 RUNNING; echo 2 RUNNING")  # as Slurm answers `--jobs=`
    monkeypatch.setenv("PATH", asked["PATH"])
    assert slurm.queued(tmp_path / "x") is None


def test_a_slurm_that_does_not_answer_has_not_said_that_a_job_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.job").write_text("4711\n")

    def answers(body: str) -> str | None:
        monkeypatch.setenv("PATH", play_slurm(tmp_path / "bin", nodes=1, squeue=body)["PATH"].split(os.pathsep)[0] + ":/usr/bin:/bin")
        return slurm.queued(tmp_path / "x")

    assert answers("echo 4711 PENDING") == "4711" and answers("") is None
    assert answers("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1") is None
    with pytest.raises(MachineError, match=r"whether job 4711 still makes .*x \(slurm_load_jobs error: Unable to contact.*try again when it answers"):
        answers("echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1")


# --- hiccups -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["show hostnames", "--oneliner show node", "--oneliner show job", "requeue"])
def test_a_controller_that_does_not_answer_for_a_while_costs_no_job(job: Played, what: str) -> None:
    status, said = job.end(STOPS, scontrol=f'[[ "$*" != "{what} "* ]] || {ONCE}\n{SCONTROL}')
    assert status == 75 and "Unable to contact" in said
    assert job.requeued == 1


def test_a_folder_that_is_away_when_a_job_begins_is_a_failure_and_no_bad_input(job: Played) -> None:
    assert job.end(setup="ls /not/mounted/venv")[0] == 2, "the status of ls, which is none of ours"
    assert job.requeued == 1 and (job.folder / "runs/x.failures").read_text() == "job 4711 at step 0: status 2 after 0 minutes\n"
    assert job.end(scontrol=SCONTROL.replace("NodeAddr", "Nothing"))[0] != 0
    assert job.requeued == 2


def test_a_setup_may_read_variables_that_are_not_set(job: Played) -> None:
    assert job.end(STOPS, setup='if [ -n "$CONDA_BACKUP_CXX" ]; then :; fi\nfalse | cat')[0] == 75
    assert job.requeued == 1


@pytest.mark.parametrize(
    "setup",
    [
        "trap 'touch cleaned' EXIT",
        "trap 'touch cleaned' EXIT; false",
        "touch cleaned; shopt -s nullglob",
        "touch cleaned; cd /; exit 1",
        "touch cleaned; set -u",
    ],
)
def test_what_a_setup_traps_sets_or_changes_does_not_reach_the_end_of_a_job(job: Played, setup: str) -> None:
    status, said = job.end(setup=setup + "\njob=4 status=0 times=9")
    assert status == 1 and job.requeued == 1 and "status 1 at step 0: failure 1 without progress" in said
    assert (job.folder / "cleaned").exists(), "what a setup wants done at its own end is done"


def _cannot_be_opened(failures: Path) -> None:
    failures.mkdir()


def _is_on_a_full_disk(failures: Path) -> None:
    failures.symlink_to("/dev/full")


@pytest.mark.parametrize("spoil", [_cannot_be_opened, _is_on_a_full_disk])
def test_failures_that_cannot_be_noted_are_counted_by_slurms_restarts_and_each_waits(job: Played, spoil: Callable[[Path], None]) -> None:
    spoil(job.folder / "runs/x.failures")
    said = [job.end(scontrol=SCONTROL.replace("echo 0", f"echo {restarts}"), restarts=restarts)[1] for restarts in range(6)]
    assert job.requeued == 3 and job.updated == 3 * ["StartTime=now+10minutes"]
    assert "given up" not in said[2] and all("given up" in words for words in said[3:])


# --- ended from outside ------------------------------------------------------------------------------------------------------------------------


def test_a_job_that_meets_its_time_limit_itself_is_queued_again_and_counts(job: Played) -> None:
    said = [job.end_from_outside(TIMED_OUT)[1] for _ in range(4)]
    assert job.requeued == 3 and "status 143 at step 0: failure 1" in said[0] and "given up" in said[-1]


def test_a_job_that_is_preempted_by_being_ended_is_queued_again_and_does_not_count(job: Played) -> None:
    for minutes_ago in (0, 0, 1, 5, 30, 50):
        assert job.end_from_outside(f"{CANCELLED} {preempted(minutes_ago)}")[0] == 143
    assert job.requeued == 6


def test_a_job_that_was_suspended_for_others_and_went_on_stays_cancelled_and_its_failures_count(job: Played) -> None:
    assert job.end_from_outside(f"{CANCELLED} {preempted(90)}")[0] == 143
    assert job.requeued == 0
    (job.folder / "state").write_text(f"JobState=RUNNING Reason=None {preempted(90)}")
    assert "failure 1 without progress" in job.end()[1]
    (job.folder / "state").write_text("JobState=RUNNING Reason=None PreemptTime=yesterday_or_so")
    assert "failure 2 without progress" in job.end()[1]


def test_a_job_that_somebody_cancelled_stays_cancelled_also_where_it_had_the_time_to_save(job: Played) -> None:
    assert job.end_from_outside(CANCELLED)[0] == 143
    (job.folder / "state").write_text(CANCELLED)
    assert job.end(STOPS)[0] == 75
    assert job.requeued == 0


def test_a_job_that_slurm_has_queued_again_itself_is_left_alone_also_where_slurm_says_so_late(job: Played) -> None:
    (job.folder / "restarts").write_text("1")
    assert job.end()[0] == 1
    assert job.end(scontrol=f'[[ "$*" != "--oneliner show job "* ]] || {ONCE}\n{SCONTROL}')[0] == 1
    assert job.requeued == 0


# --- its beginning -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "longest", "seconds"), [(None, None, 600), (24, None, 600), (0.3, None, 540), (0.001, None, 2), (None, 0.1, 180), (None, 24, 600)]
)
def test_every_job_is_told_before_its_limit_and_a_short_one_at_half_of_it(hours: float | None, longest: float | None, seconds: int) -> None:
    place = ClusterConfig.model_validate({"partition": "short", "partitions": {"short": {"max_hours": longest}}})
    script = slurm.sbatch_script(Job("train", Path("x.toml"), hours=hours), place, "x", Path("runs/x"))
    assert f"#SBATCH --signal=TERM@{seconds}\n" in script and f"export PRISM_SAVE_SECONDS={seconds}\n" in script


def test_weights_that_a_killed_rl_run_left_in_memory_are_removed_and_those_in_use_are_not(job: Played) -> None:
    srun = '[[ "$*" == *--overlap* ]] || exit 1\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"'
    left, used = (Path(tempfile.mkdtemp(prefix="prism-new-weights-", dir="/dev/shm")) for _ in range(2))
    (left / "model.safetensors").touch()
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert job.end(srun, stage="rl")[0] == 1
        assert used.exists() and not left.exists() and job.requeued == 1
    finally:
        os.close(descriptor)
        shutil.rmtree(used)
