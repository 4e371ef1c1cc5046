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
# Relative paths are below the repository: SCALECLIP_HOME, or where the submitted script lies. slurm/README.md says what
# happens at the time limit, a preemption or a failure; slurm/job.sh has further settings.
set -euo pipefail

home=${SCALECLIP_HOME:-}
if [ -z "$home" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  # sbatch runs a copy of this file from a spool folder; what was submitted, SLURM knows.
  home=$(scontrol show job "$SLURM_JOB_ID" | sed -nE 's|^ *Command=(.*)/slurm/demo\.sh( .*)?$|\1|p')
fi
home=${home:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$home/slurm/job.sh" ] || {
  echo "demo.sh: no scaleclip in '$home': set SCALECLIP_HOME to the repository" >&2
  exit 2
}
source "$home/slurm/job.sh"
run_job package:scaleclip/configs/demo.yaml "$@"
