"""`python -m neighborhood_attention.tune`."""

import sys

from neighborhood_attention.tune.command import main

if __name__ == "__main__":  # not where a process that compiles imports it
    main(sys.argv[1:])
