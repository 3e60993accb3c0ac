"""`python -m flows.cli` is `qrpo`."""

from flows.cli.main import main

main()
