"""`python -m spinlm`, for torchrun."""

from spinlm.cli import main

main()
