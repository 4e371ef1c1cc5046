#!/usr/bin/env bash
#SBATCH --job-name=scaleclip-demo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=USR2@60
#
# Train and evaluate the demo, one rank a task:
#
#   sbatch slurm/demo.sh                                    two nodes, run folder runs/demo
#   sbatch --nodes 4 slurm/demo.sh optim.lr=1e-3 ...        sbatch's own options first, overrides of the config last
#   bash slurm/demo.sh optim.lr=1e-3 ...                    the same on a machine without SLURM
#
# Relative paths are below the repository. A minute before its time limit, and on preemption where the cluster gives
# notice, the job saves and requeues itself; however it ended, a job with the same run folder goes on from the last
# checkpoint. `scancel JOB` ends it for good, `scancel --signal=USR2 JOB` makes it save and start again.
#
# Environment: SCALECLIP_HOME    the repository (default: the one that the submitted script lies in)
#              SCALECLIP_PYTHON  the Python to run (default: .venv/bin/python in the repository)
set -euo pipefail

die() {
  echo "demo.sh: $*" >&2
  exit 2
}

home=${SCALECLIP_HOME:-}
if [ -z "$home" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  # sbatch runs a copy of this file from a spool folder; what was submitted, SLURM knows.
  home=$(scontrol show job "$SLURM_JOB_ID" | sed -nE 's|^ *Command=(.*)/slurm/demo\.sh( .*)?$|\1|p')
fi
home=${home:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -d "$home/scaleclip" ] || die "no scaleclip in '$home': set SCALECLIP_HOME to the repository"
cd "$home"
python=${SCALECLIP_PYTHON:-$PWD/.venv/bin/python}
command -v "$python" >/dev/null || die "no Python at '$python': run 'make demo' in $PWD once, or set SCALECLIP_PYTHON"

[ -n "${SLURM_JOB_ID:-}" ] || exec "$python" -m scaleclip demo "$@"

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$OMP_NUM_THREADS # since SLURM 22.05 srun does not take it over from sbatch
status=0
srun --kill-on-bad-exit=1 "$python" -m scaleclip demo "$@" || status=$?
# 128 + USR2: the ranks have saved and left before SLURM would kill them. SLURM requeues only jobs that it killed itself.
[ "$status" != 140 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
