"""`python -m torchtrim`: the command line."""

from torchtrim.cli import main

main()
