#!/usr/bin/env bash
#SBATCH --job-name=scaleclip-demo
#SBATCH --nodes=2
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
#   sbatch --nodes=1-4 slurm/demo.sh ...                    as many nodes as there are
#   bash slurm/demo.sh optim.lr=1e-3 ...                    the same on a machine without SLURM
#
# Relative paths are below the repository: SCALECLIP_HOME, or where the submitted script lies. slurm/README.md says what
# happens at the time limit, a preemption or a failure; slurm/job.sh has further settings.
set -euo pipefail
# sbatch runs a copy of this file from a spool folder; what was submitted, SLURM knows
submitted() { scontrol show job "$SLURM_JOB_ID" | sed -nE 's|^ *Command=(.*)/slurm/[^/]*\.sh( .*)?$|\1|p'; }
home=${SCALECLIP_HOME:-${SLURM_JOB_ID:+$(submitted)}}
home=${home:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$home/slurm/job.sh" ] || { echo "no scaleclip in '$home': set SCALECLIP_HOME to the repository" >&2; exit 2; }
source "$home/slurm/job.sh"
run_job package:scaleclip/configs/demo.yaml "$@"
