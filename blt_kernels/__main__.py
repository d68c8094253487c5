"""``python -m blt_kernels`` runs the command line: see `blt_kernels.cli`."""

from blt_kernels.cli import main

main()
