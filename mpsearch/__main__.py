"""`python -m mpsearch`."""

if __name__ == "__main__":
    import os
    import sys

    if sys.path[0] in ("", os.getcwd()):  # Python puts the working directory there, which may be a folder from elsewhere
        del sys.path[0]
    from mpsearch.cli import main

    main()
