#!/bin/bash
# Trains on two nodes with four GPUs each. For other sizes: sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 …
#   sbatch experiments/slurm/train.sh --config experiments/rain100h.yaml [--data.batch_size 4 …]
# Arguments after the script are passed to derain fit. --data.batch_size is the batch size of one GPU; that of a step is
# larger by the number of GPUs times --trainer.accumulate_grad_batches. The run is saved to runs/EXPERIMENT/fit-JOBID. A
# requeued job resumes from its last checkpoint.
#SBATCH --job-name=derain-fit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue

export SLURM_KILL_BAD_EXIT=1 # if a task dies, the others end instead of waiting for it
srun derain fit "$@" --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --trainer.strategy ddp_find_unused_parameters_true
