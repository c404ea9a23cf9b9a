"""What the weights of a network were trained with, by their own configuration: size and statistics of the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm

from coreg.records import Number, RecordError, check_record, read_record


def _made_for(name: str) -> dict[str, Any]:
    """What a timm model's or folder's weights were trained with, by timm's names; nothing where the folder is damaged."""
    if name.startswith("local-dir:"):
        try:
            config = read_record(Path(name.removeprefix("local-dir:")) / "config.json")
        except RecordError:
            return {}  # `create_backbone` says what is wrong with the folder
        config = config.get("pretrained_cfg", config)
    else:
        config = timm.get_pretrained_cfg(name, allow_unregistered=True).to_dict()
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()} if isinstance(config, dict) else {}


def trained_with(name: str) -> tuple[list[float], list[float]] | None:
    """Mean and deviation of the pixels, in 0..1, that a timm model's or folder's weights were trained with, if it tells."""
    config, numbers = _made_for(name), [Number(whole=False)]
    try:
        check_record(config, {"mean": numbers, "std": numbers})
    except RecordError:
        return None
    return (config["mean"], config["std"]) if len(config["mean"]) == len(config["std"]) else None


def own_size(name: str) -> int | None:
    """The side of the images that a timm model or folder was made for."""
    config = _made_for(name)
    try:
        check_record(config, {"input_size": [Number(1, 8192)]})
    except RecordError:
        return None
    return config["input_size"][-1]


def takes_one_size(name: str) -> bool:
    """Whether a timm model or folder takes images of one size alone, as most transformers do."""
    return _made_for(name).get("fixed_input_size") is True


def own_pixels(name: str, channels: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """`image_size`, `mean` and `std` for a network with weights that `takes_one_size`.

    Nothing for networks that take images of any size, and nothing that is not known.

    Args:
        name, channels, arguments: as for `coreg.nets.model.create_backbone`; an `img_size` among these is the size.
    """
    if not takes_one_size(name):
        return {}
    asked = arguments.get("img_size")
    size, pixels = asked if isinstance(asked, int) else own_size(name), trained_with(name)
    known = {} if size is None else {"image_size": size}
    if pixels is not None and len(pixels[0]) == channels:
        known |= {"mean": pixels[0], "std": pixels[1]}
    return known
