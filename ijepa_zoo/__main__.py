"""`python -m ijepa_zoo`, for torchrun: `torchrun --nproc-per-node 8 -m ijepa_zoo COMMAND ...`."""

import sys

from .cli import main

if __name__ == "__main__":  # not in loader workers that import the main module again
    sys.exit(main())
