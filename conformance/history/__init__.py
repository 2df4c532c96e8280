"""Bugs that shipped: each is found again in the release that had it, and not in the one that mended it.

`bugs` is the table, data only; `replay` makes the environments and asks. `refpeft history` shows
what they say.
"""

from refpeft.conformance.history.bugs import BUGS, Bug
from refpeft.conformance.history.replay import Answer, Result, history

__all__ = ["BUGS", "Answer", "Bug", "Result", "history"]
