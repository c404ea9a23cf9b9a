"""Backbones and heads; importing it registers the PreAct ResNets with timm."""

from coreg.nets import preact  # noqa: F401
