"""`python -m advssl` is the command line."""

from advssl.cli import main

main()
