#!/usr/bin/env bash
#SBATCH --job-name=scaleclip-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=USR2@60
#
# Follow a run while it trains: every checkpoint is evaluated once, as it comes, until the run is finished. It may be submitted
# together with the run, and waits for its begin.
#
#   sbatch slurm/eval.sh runs/b32                                       by what the run measures itself
#   sbatch slurm/eval.sh runs/b32 --suite imagenet --data /data/eval    another suite
#   sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/eval.sh ...      a rank a GPU
#   bash slurm/eval.sh runs/b32 ...                                     the same on a machine without SLURM
#
# Figures go into RUN/evaluations/step_X, a file a data set. A job that is stopped, or ends at its time limit, goes back into the
# queue and on with the data set that it was at. sbatch's own options come first. Relative paths are below the repository:
# SCALECLIP_HOME, or where the submitted script lies. slurm/job.sh has further settings.
set -euo pipefail
# sbatch runs a copy of this file from a spool folder; what was submitted, SLURM knows
submitted() { scontrol show job "$SLURM_JOB_ID" | sed -nE 's|^ *Command=(.*)/slurm/[^/]*\.sh( .*)?$|\1|p'; }
home=${SCALECLIP_HOME:-${SLURM_JOB_ID:+$(submitted)}}
home=${home:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$home/slurm/job.sh" ] || { echo "no scaleclip in '$home': set SCALECLIP_HOME to the repository" >&2; exit 2; }
source "$home/slurm/job.sh"
run_command eval "$@" --follow
