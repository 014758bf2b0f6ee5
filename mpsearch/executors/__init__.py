"""Executors: where evaluations run. The contract is `base.Executor`.

`in_process` (default) evaluates one allocation after the other, `local` starts processes on this machine. `dask` uses an
existing cluster: `dask scheduler` on one host, `dask worker tcp://head:8786 --nthreads 1` on each (on SLURM: `srun -n 16 dask
worker ...`). `ray` starts actors on this machine, or joins a cluster with `executor.address=head:6379`: `ray start --head` on
one host, `ray start --address=head:6379` on the others.

Each worker builds the model once and needs mpsearch, your code and your data; what travels is an allocation and its score.
The work of a killed worker is done again, and a killed search resumes on any executor. The trials depend on the seed and on
how many are in flight (`study.in_flight`, at least two per worker), the last bits of their scores on `executor.threads`;
neither depends on where or in which order they were evaluated.
"""
