"""`python -m scaleclip`."""

from scaleclip.cli import main

main()
