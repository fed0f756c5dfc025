"""The package's one benchmark suite: what ``python -m ffkernels bench`` prints and ``pytest bench/`` records.

cases.py says what is measured, problem.py makes its tensors, torch_columns.py and columns.py compute it in every way
that is compared, check.py sees that all compute the same, timing.py takes the times, limit.py what the machine allows.
measure.py does it all for one case; report.py and picture.py show the results, command.py is the command line.

On a GPU gpu.py does the same, for the types in formats.py. predict.py says what GPUs would take: what plain torch does
is counted by count.py, what the kernels launch is in planned.py.
"""
