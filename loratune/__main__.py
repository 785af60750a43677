"""``python -m loratune`` and ``torchrun -m loratune``."""

from loratune.cli import main

if __name__ == "__main__":
    main()
