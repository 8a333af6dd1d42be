"""How a Slurm job begins and ends, as shell text: one job at a time makes an output, and what follows from each end.

The rules stand in docs/launch.md, a row for each end. Owns: which end is counted, when a job is queued again, when it is given up. Refuses: to queue
again what somebody cancelled, what Slurm has queued again itself, and bad input that was met before anything was done.
Progress is the newest checkpoint's step. Where a stage saves none it is the bytes of its output, which grow with its finished work.
"""

import shlex

WITH_CHECKPOINTS = frozenset({"train", "extend", "rl"})
"""stages whose progress is their newest checkpoint alone: before the first one their logs grow too"""
ASIDE = ("provenance.json", "trackers.json", "wandb", "tensorboard", "*.log", "*.tmp")
"""files and folders that grow in an output without its work, at each start anew"""
BRIEF_MINUTES = 60
"""what fails sooner after its start counts for good, whatever its output grew by; a time limit that a stage is not told of comes later"""
BRIEF_TIMES = 10
"""so many times `requeues` such failures end a job"""

ALONE = r"""
# one job at a time makes an output
other=$(cat "$PRISM_OUTPUT.job" 2>/dev/null) found=
[[ ${other:-$SLURM_JOB_ID} == "$SLURM_JOB_ID" ]] ||
  found=$(squeue --noheader --format=%i --states=PENDING,RUNNING,SUSPENDED --jobs="$other" 2>&1)
if [[ $found && $found == "$other" ]]; then
  echo "error: job $other makes $PRISM_OUTPUT already; scancel it first, or leave the work to it" >&2
  exit 2
fi
if [[ $other != "$SLURM_JOB_ID" && (! $found || $found == *"Invalid job id"*) ]]; then
  echo "$SLURM_JOB_ID" > "$PRISM_OUTPUT.job.tmp" && mv "$PRISM_OUTPUT.job.tmp" "$PRISM_OUTPUT.job"  # a full disk leaves the old one
fi
rm -f "$PRISM_ERROR_FILE" "$PRISM_ERROR_FILE.never" "$PRISM_STOPPED_FILE"
"""

PROGRESS = r"""
patiently() { for _ in {1..60}; do "$@" && return 0; sleep 30; done; return 1; }  # Slurm's controller may be away for minutes

newest() {  # the step of the newest checkpoint
  local found
  found=$(ls -1d "$PRISM_OUTPUT"/checkpoints/step_????????/COMPLETE 2>/dev/null | tail -n 1)
  [[ $found == */COMPLETE ]] || found=
  found=${found%/COMPLETE}
  echo "step $((10#0${found##*step_}))"
}
"""
REACHED_STEPS = r"""
reached() { newest; }  # what grows as the work does
"""
REACHED_BYTES = r"""
reached() {  # what grows as the work does
  [[ ! -d $PRISM_OUTPUT/checkpoints ]] || { newest; return 0; }
  local bytes
  bytes=$(du --summarize --bytes @ASIDE@ "$PRISM_OUTPUT/." 2>/dev/null | cut -f 1)
  echo "bytes ${bytes:-0}"
}
"""

ENDING = r"""
ending() {  # every end comes by here; docs/launch.md has a table of them
  local status=$? counts=yes refused= job preempted= place times=0 brief=0 later=0
  trap '' TERM
  set +e
  [[ ! -e $PRISM_STOPPED_FILE ]] || { status=75 counts=; }  # it was told to stop, and has saved
  [[ ! -e $PRISM_ERROR_FILE ]] || { status=2 counts=yes refused=yes; }  # bad input: its message is above
  [[ ! -e $PRISM_ERROR_FILE.never ]] || refused=never
  rm -f "$PRISM_ERROR_FILE" "$PRISM_ERROR_FILE.never" "$PRISM_STOPPED_FILE"
  ((status)) || [[ -e $PRISM_OUTPUT/COMPLETE ]] || status=75  # it ended well, before its work was done
  ((status)) || exit 0
  # what is refused before anything was done, or would come to the same again; later it may be a fault that passes
  if [[ $refused == never || $refused && $(newest) == "step 0" && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then exit 2; fi

  job=$(SLURM_TIME_FORMAT=standard patiently scontrol --oneliner show job "$SLURM_JOB_ID")
  [[ -z $job || $job == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || exit "$status"  # Slurm has queued it again itself
  # a job that was suspended for others some time ago, and went on, keeps that time as its PreemptTime
  [[ ! $job =~ " PreemptTime="([0-9][^ ]*) ]] || preempted=$(date +%s --date="${BASH_REMATCH[1]}")
  ((preempted > $(date +%s) - 3600)) || preempted=
  [[ $job != *" JobState=COMPLETING "* || $job == *" Reason=TimeLimit "* || $preempted ]] || exit "$status"  # cancelled
  [[ ! $preempted ]] || counts=  # who makes room for others has not failed
@CLEAR@
  if [[ $counts ]]; then  # how often has it failed since it had got farthest?
    place=$(reached)
    if echo "job $SLURM_JOB_ID at $place: status $status after $((SECONDS / 60)) minutes" >> "$PRISM_OUTPUT.failures"; then
      read -r times brief < <(awk -v job="$SLURM_JOB_ID" '
        $2 == job { if ($4 != unit || $5 + 0 > most) { unit = $4; most = $5 + 0; n = 0 } n++; brief += $4 == "bytes" && $(NF - 1) < @MINUTES@ }
        END { print n + 0, brief + 0 }' "$PRISM_OUTPUT.failures")
    fi
    later=$((10 * times - 10))
    ((times > 0)) || { times=$((${SLURM_RESTART_COUNT:-0} + 1)) later=10; }  # it cannot be noted: a full disk, perhaps
    echo "status $status at $place: failure $times without progress, of $((PRISM_REQUEUES + 1)) that end this job" >&2
    ((brief <= @TIMES@ * PRISM_REQUEUES)) || echo "and $brief failures within an hour of a start, whatever the output grew by" >&2
    if ((times > PRISM_REQUEUES || brief > @TIMES@ * PRISM_REQUEUES)); then
      echo "error: given up: mend what is said above, and submit it again" >&2
      exit "$status"
    fi
  fi
  echo "status $status: queued again" >&2
  patiently scontrol requeue "$SLURM_JOB_ID" || exit "$status"
  ((later == 0)) || scontrol update JobId="$SLURM_JOB_ID" StartTime="now+${later}minutes"  # a broken mount may take a while
  trap - TERM
  sleep 60  # until Slurm ends this script
  exit "$status"
}
trap ending EXIT
trap 'trap "" TERM; exit 143' TERM
"""
CLEAR_SHARED_MEMORY = r"""
  # memory that killed ranks left; what is in use is locked
  [[ $job == *" JobState=COMPLETING "* ]] || timeout --kill-after=5 60 srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c 'for folder in /dev/shm/prism-new-weights-*; do [[ ! -d $folder ]] || flock --nonblock "$folder" rm -rf "$folder"; done'
"""
"""of RL alone: new weights on their way to the servers of its generation"""


def functions(stage: str) -> str:
    """The shell functions of a script, and the traps that call them. They read PRISM_OUTPUT, PRISM_REQUEUES and the variables of the two files."""
    reached = REACHED_STEPS if stage in WITH_CHECKPOINTS else REACHED_BYTES
    filled = {
        "@CLEAR@\n": CLEAR_SHARED_MEMORY.lstrip("\n") if stage == "rl" else "",
        "@ASIDE@": " ".join(f"--exclude={shlex.quote(name)}" for name in ASIDE),
        "@MINUTES@": str(BRIEF_MINUTES),
        "@TIMES@": str(BRIEF_TIMES),
    }
    text = PROGRESS + reached + ENDING
    for mark, words in filled.items():
        text = text.replace(mark, words)
    return text.strip("\n")
