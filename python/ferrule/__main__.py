"""`python -m ferrule`."""

import sys

from .cli import main

sys.exit(main())
