#!/usr/bin/env bash
#SBATCH --job-name=scaleclip-clips
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=USR2@120
#
# CLIPS B/16 on Recap-DataComp-1B, 14 billion pairs at 160, 224 and 336 px.
# configs/clips.yaml has the recipe, configs/README.md what of it was verified, `scaleclip plan` what it takes on your nodes.
#
#   sbatch slurm/clips.sh 'data.sources.recap.shards=/data/recap-datacomp-1b/*.tar'
#
# sbatch's own options come first, overrides of the config last. Relative paths are below the repository: SCALECLIP_HOME,
# or where the submitted script lies. slurm/README.md says what happens at the time limit, a preemption or a failure;
# slurm/job.sh has further settings.
set -euo pipefail
export SCALECLIP_GRACE_S=${SCALECLIP_GRACE_S:-120}
# sbatch runs a copy of this file from a spool folder; what was submitted, SLURM knows
submitted() { scontrol show job "$SLURM_JOB_ID" | sed -nE 's|^ *Command=(.*)/slurm/[^/]*\.sh( .*)?$|\1|p'; }
home=${SCALECLIP_HOME:-${SLURM_JOB_ID:+$(submitted)}}
home=${home:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$home/slurm/job.sh" ] || { echo "no scaleclip in '$home': set SCALECLIP_HOME to the repository" >&2; exit 2; }
source "$home/slurm/job.sh"
run_job configs/clips.yaml "$@"
