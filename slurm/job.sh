# What the sbatch scripts of this folder share: they set `home`, the repository, source this file and call run_job or run_command.
#
# Environment: SCALECLIP_PYTHON    the Python to run (default: .venv/bin/python in the repository)
#              SCALECLIP_ACTIVATE  a script to source first: `module load ...`, interconnect settings, a virtual environment
#              SCALECLIP_SRUN      further options of srun, such as --container-image=... --container-mounts=...
#              SCALECLIP_GRACE_S   seconds between SLURM's warning and the end (default 60): what --signal says
#              SCALECLIP_CHECK     0 trains without checking the nodes first

die() {
  echo "scaleclip: $*" >&2
  exit 2
}

run_job() { # CONFIG [KEY=VALUE...]: train it on the job's nodes; without SLURM, here
  run_command train "$@"
}

run_command() { # COMMAND [ARGUMENT...]: run this command of scaleclip's on the job's nodes; without SLURM, here
  cd "$home"
  # shellcheck disable=SC1090 # the user's
  [ -z "${SCALECLIP_ACTIVATE:-}" ] || source "$SCALECLIP_ACTIVATE"
  python=${SCALECLIP_PYTHON:-$PWD/.venv/bin/python}
  command -v "$python" >/dev/null || [ -n "${SCALECLIP_SRUN:-}" ] ||
    die "no Python at '$python': run 'make demo' in $PWD once, or set SCALECLIP_PYTHON"
  [ -n "${SLURM_JOB_ID:-}" ] || exec "$python" -m scaleclip "$@"

  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05 srun does not take it over from sbatch
  [ "$1" != train ] || [ "${SCALECLIP_CHECK:-1}" = 0 ] || check_nodes "${@:2}"
  local status=0
  command=$1
  note_ends
  # shellcheck disable=SC2086 # several options
  srun --kill-on-bad-exit=1 ${SCALECLIP_SRUN:-} "$python" -m scaleclip "$@" || status=$?
  end_job "$status"
}

note_ends() { # from here on, keep what srun says of ranks that end, for end_job
  errors=$(mktemp)
  exec 3>&2 2> >(tee "$errors" >&3)
  noting=$!
}

check_nodes() { # CONFIG [KEY=VALUE...]: end the job if something is amiss; start it again elsewhere if that is some nodes' fault
  local found bad status=0 ranks=$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))
  # shellcheck disable=SC2086
  found=$(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    ${SCALECLIP_SRUN:-} "$python" -m scaleclip check --ranks "$ranks" --grace "${SCALECLIP_GRACE_S:-60}" "$@") || status=$?
  [ "$status" != 0 ] || return 0
  # a line a failed check, however many nodes say so
  sed -nE 's/^(bad node|check failed on) [^:]+: /check failed: /p' <<<"$found" | sort | uniq -c | sed -E 's/^ *([0-9]+) (.*)/\2 (nodes: \1)/'
  bad=$(sed -nE 's/^(bad node|check failed on) ([^:]+): .*/\2/p' <<<"$found" | sort -u)
  [ -n "$bad" ] || end_job "$status"
  # what all nodes say alike no other node would do better, unless the job has but one
  if [ "$(wc -l <<<"$bad")" = "$SLURM_JOB_NUM_NODES" ]; then
    [ "$SLURM_JOB_NUM_NODES" = 1 ] && ! grep -q '^check failed' <<<"$found" || exit 2
  fi
  [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] || die "nodes fail again and again: see above"
  bad=$(paste -sd, <<<"$bad")
  echo "starting again without $bad"
  start_again "$bad"
}

end_job() { # STATUS of srun, which is the highest of the ranks'
  local status=$1 first
  if [ -n "${noting:-}" ]; then
    exec 2>&3
    wait "$noting" || true
    # The first to end decides: one that waits in NCCL for a rank that gave up is killed in the end.
    first=$(sed -nE '/: tasks? [^:]+: /{s/.*: Exited with exit code ([0-9]+)$/\1/p;q}' "$errors")
    status=${first:-$status}
    rm "$errors"
  fi
  case $status in
    # an error nobody foresaw: training itself sees whether it gets on
    70)
      [ "${command:-train}" = train ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] || die "$command fails again and again: see above"
      start_again ""
      ;;
    # saved on SLURM's warning (128 + USR2); a hang; killed: ABRT, BUS, KILL, SEGV
    140 | 75 | 134 | 135 | 137 | 139) start_again "" ;;
    # TERM: of srun to the others when one dies while they start, and of SLURM's when it ends the job
    143) [ "$(squeue --noheader --jobs "$(job_id)" --format %T)" != RUNNING ] || start_again "" ;;
  esac
  exit "$status" # 0: finished; else the ranks have said why, and would say it again
}

job_id() { # as scontrol takes it: the raw id of an array's last member is the whole array's
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

start_again() { # NODES: put the job back into the queue, for nodes other than these
  local excluded job _
  job=$(job_id)
  trap '' TERM # which SLURM now sends
  scontrol requeue "$job" || die "job $job cannot be requeued: submit it again"
  if [ -n "$1" ]; then
    excluded=$(scontrol show job "$job" | sed -nE 's/.*ExcNodeList=([^ ]+).*/\1/p' | sed 's/^(null)$//')
    # a job's nodes can be chosen only while it waits
    for _ in {1..20}; do
      ! scontrol update "JobId=$job" "ExcNodeList=$1${excluded:+,$excluded}" || break
      sleep 0.5
    done
  fi
  exit 1
}
