#!/usr/bin/env bash
#SBATCH --job-name=scaleclip-captions
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
# Make texts for image-text pairs: rewrites of captions by a language model, or new captions by a vision-language model.
#
#   sbatch --array 0-7 slurm/captions.sh rewrite MODEL --data '/data/cc12m/*.tar' --out /data/cc12m-rewrites
#   sbatch --array 0-7 slurm/captions.sh recaption MODEL --data '/data/cc12m/*.tar' --out /data/cc12m-recaptions
#   sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/captions.sh ...    a rank a GPU; with --array, each task has as many
#   bash slurm/captions.sh rewrite ...                                    the same on a machine without SLURM
#
# Shards are dealt over all ranks of all tasks. A task that is stopped, or ends at its time limit, goes back into the queue and on
# with the batch that it was at. sbatch's own options come first. Relative paths are below the repository: SCALECLIP_HOME, or
# where the submitted script lies. slurm/job.sh has further settings.
set -euo pipefail
# sbatch runs a copy of this file from a spool folder; what was submitted, SLURM knows, of an array's task by the array's id
task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
submitted() { scontrol show job "${task:-$SLURM_JOB_ID}" | sed -nE 's|^ *Command=(.*)/slurm/[^/]*\.sh( .*)?$|\1|p'; }
home=${SCALECLIP_HOME:-${SLURM_JOB_ID:+$(submitted)}}
home=${home:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$home/slurm/job.sh" ] || { echo "no scaleclip in '$home': set SCALECLIP_HOME to the repository" >&2; exit 2; }
source "$home/slurm/job.sh"
run_command captions "$@"
