"""python -m mote_ext.cli: the command `mote` where it is not installed."""

import sys

from mote_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
