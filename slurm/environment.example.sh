# What a site needs: copy to slurm/environment.sh. submit.sh sources it where jobs are submitted, train.sbatch on the
# first node of a job, and srun hands what is exported on to every rank.
# shellcheck shell=bash

# module load cuda/12.8

# Options of sbatch for every job; those given to submit.sh go before.
# export SBATCH_ACCOUNT=project SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=24:00:00

# The Python that has torch and DeepSpeed; by default .venv of the checkout, else python3.
# PYTHON=/shared/venv/bin/python

# A job that lost a rank starts again at most so often without a new checkpoint in between.
# MAX_RETRIES=3

# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# Ranks in a container, with Apptainer:
# CONTAINER=(apptainer exec --nv --bind /shared /shared/images/eva.sif)
# or with enroot, through the pyxis plugin:
# SRUN_OPTIONS=(--container-image=/shared/images/eva.sqsh --container-mounts=/shared:/shared --container-workdir="$PWD")
# submit.sh reads the configuration outside of it; the Python of the container may be another:
# [[ -z ${SLURM_JOB_ID:-} ]] || PYTHON=python3
