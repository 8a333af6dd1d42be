"""Starting work: a job as torchrun's command line, a Slurm script or a nemo-run experiment; a pipeline file as a chain of jobs.

Never imports torch.
"""
