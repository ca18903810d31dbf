"""``python -m ijepa_zoo.cli``, which torchrun needs."""

import sys

from . import main

sys.exit(main())
