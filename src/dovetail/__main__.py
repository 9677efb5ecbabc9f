"""`python -m dovetail`."""

from dovetail.cli.app import main

main()
