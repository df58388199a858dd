"""What holds for every test."""

import os
import signal
from pathlib import Path

# A shell that starts this in the background has it ignore SIGINT, and children inherit that: tests that interrupt could
# not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton decides when a kernel's module is imported whether it is compiled or interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
