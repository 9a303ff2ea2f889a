"""``python -m csmae`` runs the program ``csmae``."""

import sys

from csmae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
