"""`python -m mpsearch`."""

from mpsearch.cli import main

if __name__ == "__main__":
    main()
