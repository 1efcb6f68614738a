"""`python -m refine_harness` is `refine`."""

from refine_harness.cli import main

main()
