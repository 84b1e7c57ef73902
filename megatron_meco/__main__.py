"""`python -m megatron_meco` is the same as `meco`."""

import sys

from megatron_meco.cli import main

if __name__ == "__main__":
    sys.exit(main())
