"""`python -m deltaprompt` is the `deltaprompt` command."""

from deltaprompt.cli import main

if __name__ == "__main__":
    main()
