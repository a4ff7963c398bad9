"""`python -m tombola` is the `tombola` command."""

from tombola.cli import main

if __name__ == "__main__":
    main()
