"""`qrpo explain`: the origin of all numbers of one prompt, or of one completion."""

from qrpo_core.inspection.explain.explanation import explain
from qrpo_core.inspection.explain.text import explain_lines

__all__ = ["explain", "explain_lines"]
