"""`python -m megatron_klear.cli`, and so `torchrun -m megatron_klear.cli sft ...`, is `klear`."""

import sys

from megatron_klear.cli import main

if __name__ == "__main__":
    sys.exit(main())
