"""What holds for every test."""

import signal

# A shell that starts this in the background has it ignore SIGINT, and children inherit that: tests that interrupt could
# not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
