"""`python -m pipeline`: the console script where a launcher such as torchrun wants a module."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
