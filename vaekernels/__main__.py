"""`python -m vaekernels` is the command `vaekernels`."""

from __future__ import annotations

import sys

from vaekernels.cli import main

sys.exit(main())
