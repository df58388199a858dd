"""``python -m charonia_client`` is ``charonia-client``."""

import sys

from charonia_client.cli import main

sys.exit(main())
