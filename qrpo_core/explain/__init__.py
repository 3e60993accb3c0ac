"""`qrpo explain`: where the numbers of one prompt, or of one completion of it, come from."""

from qrpo_core.explain.gather import explain
from qrpo_core.explain.text import explain_lines

__all__ = ["explain", "explain_lines"]
