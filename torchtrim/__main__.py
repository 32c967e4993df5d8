"""`python -m torchtrim`: the command line."""

from torchtrim.cli import main

if __name__ == "__main__":
    main()
