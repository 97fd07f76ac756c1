"""The tiny start models that ship with the package, and the script that makes them."""

from pathlib import Path

EMBEDDED = "embedded"
"""What ``model.path`` says for the one that has seen B=4, 8 and 16, and gets worse with the block."""
_HERE = Path(__file__).parent
FOLDERS = {EMBEDDED: _HERE, "embedded-b4": _HERE / "b4"}
"""Where each is; ``embedded-b4`` has seen B=4 only, and fails in larger blocks."""
