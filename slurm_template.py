"""The batch script of every job array that the launcher submits: edit it for your cluster.

The launcher fills in these fields, and each must be there:

    {job_name}   for squeue: the experiment's family and task
    {array}      the array's indices, "0-999"
    {log_file}   what Slurm itself and the supervisor have to say, one file a task
    {source}     the folder of the source snapshot, quoted for the shell
    {command}    the supervisor's command, quoted for the shell

A shell's ${VARIABLE} is left alone. Options of --sargs stand on sbatch's command line, so they win
over the lines here. docs/cluster.md shows GPU partitions, modules, conda and containers.
"""

# A task that its time limit interrupts is requeued this often at most.
MAX_REQUEUES = 100

# --signal: this many seconds before the time limit the trainer saves its state. Slurm looks at
# limits every 30 s and may signal up to 60 s early. --requeue: a preempted task starts again.
TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={job_name}
#SBATCH --array={array}
#SBATCH --output={log_file}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120
##SBATCH --partition=gpu
##SBATCH --gres=gpu:1
##SBATCH --cpus-per-task=4
##SBATCH --mem=16G
##SBATCH --time=24:00:00

# module load cuda/11.8

cd {source} || exit 1
exec {command}
"""
