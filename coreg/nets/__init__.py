"""Backbones and heads; importing it registers with timm what it does not have."""

from coreg.nets import preact, two_heads  # noqa: F401
