"""`python -m dovetail` runs the command line."""

from dovetail.cli.app import main

main()
