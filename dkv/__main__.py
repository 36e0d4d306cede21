"""`python -m dkv`: the command line without the installed script."""

import sys

from dkv.cli import main

sys.exit(main())
