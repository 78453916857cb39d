"""`python -m h1bjax.cli`."""

import sys

from h1bjax.cli import main

sys.exit(main())
