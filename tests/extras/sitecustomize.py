"""Python imports this at its start: see hiding.py."""

import hiding

hiding.install()
