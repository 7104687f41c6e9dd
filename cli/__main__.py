"""``python -m zowrap.cli`` is ``zowrap``."""

import sys

from zowrap.cli import main

sys.exit(main())
