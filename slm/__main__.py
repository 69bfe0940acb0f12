"""`python -m slm`: the command line."""

from slm.cli import main

main()
