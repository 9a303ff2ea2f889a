"""``python search.py STUDY.yaml …`` is ``csmae search STUDY.yaml …``."""

import sys

from csmae.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
