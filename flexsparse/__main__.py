"""`python -m flexsparse` is the command line, where `flexsparse` is not on the path."""

import sys

from flexsparse.commands import main

sys.exit(main())
