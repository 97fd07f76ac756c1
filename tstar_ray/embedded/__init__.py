"""The tiny start model that ships with the package, and the script that makes it."""

EMBEDDED = "embedded"
"""What ``model.path`` says for it."""
