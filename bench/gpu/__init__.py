"""All that a GPU can tell, in three short calls: `make gpu`, or

    python3 -m bench.gpu OUT [--call 1|2|3] [--minutes 5] [--only NAME,NAME] [--caches DIR] [--cpu]

No network, no pip, no install: the package is taken from the working tree with the Python that runs this. While the
native engine is built, kernels are compiled and checked by many processes, and Inductor compiles what it has to,
nothing is timed; then one process times, block after block, what is wanted most first. Every block has a time limit of
its own and leaves OUT/NAME.json; OUT/summary.md is printed last. `--caches` keeps what Triton and Inductor compiled for
the next call. `--cpu` goes through the same code without a GPU, on a tiny model: it shows that the script works, and
its times mean nothing.
"""
