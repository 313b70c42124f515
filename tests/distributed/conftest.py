"""
The whole of: the fixtures of this level.

Called from: pytest.
Must never: be imported by name.
"""

from process.ranks import ranks, warm

__all__ = ["ranks", "warm"]
