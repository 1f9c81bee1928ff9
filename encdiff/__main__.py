"""`python -m encdiff` is the command `encdiff`."""

from encdiff.cli.app import main

if __name__ == "__main__":
    main()
