#!/bin/sh
# What sbatch runs, once for each job: the command it is given, by srun on every task of the job. A run that was told to
# stop before it was done returns 75, and the job goes back into the queue.
srun --kill-on-bad-exit=1 -- "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "${SLURM_JOB_ID:?}"
fi
exit "$code"
