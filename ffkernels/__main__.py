"""``python -m ffkernels``."""

import sys

from .cli import main

sys.exit(main())
