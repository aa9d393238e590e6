#!/bin/sh
# What sbatch runs, once for each job: the command it is given, by srun on every task of the job. A run that was told to
# stop before it was done returns 75 from every task, and the job goes back into the queue. A task that ends early is
# waited for by the others, which JAX ends, but within two minutes; were they killed at once, the code would be that of
# the kill.
srun --kill-on-bad-exit=0 --wait=110 -- "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "${SLURM_JOB_ID:?}"
fi
exit "$code"
