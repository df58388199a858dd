"""The `charonia` command over another template than the packaged model: serve_main.py TEMPLATE ARGUMENT..."""

import sys
from pathlib import Path

from charonia.entrypoints import cli, repository

repository.find_template = lambda: Path(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
