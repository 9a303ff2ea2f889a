"""``python train_worker.py RUN.yaml …`` is ``csmae train RUN.yaml …``; ``torchrun`` starts it, too."""

import sys

from csmae.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
