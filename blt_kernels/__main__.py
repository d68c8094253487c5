"""``python -m blt_kernels``: the command line, see `blt_kernels.cli`."""

from blt_kernels.cli import main

main()
