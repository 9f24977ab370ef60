"""The command in a process that may take so much memory more than it has when the libraries are loaded.

    python short_of_memory.py MEGABYTES ARGUMENTS...

The system refuses it the rest, as a machine does whose memory is full: RLIMIT_AS, which Linux keeps.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def limit(megabytes: int) -> None:
    """Of address space, on top of what is mapped now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + megabytes * 2**20,) * 2)


if __name__ == "__main__":
    import peft  # noqa: F401
    import torch

    import spinlm.planning
    import spinlm.selfplay  # noqa: F401
    from spinlm.cli import main

    torch.ones(512, 512) @ torch.ones(512, 512)  # starts what threads there are
    megabytes, sys.argv = int(sys.argv[1]), ["spinlm", *sys.argv[2:]]
    limit(megabytes)
    main()
