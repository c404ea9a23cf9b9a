"""A trained run as ordinary timm folders, which `timm.create_model("local-dir:FOLDER")` loads after `import coreg.nets`.

Layout: export/net1/, export/net2/ (config.json, model.safetensors) and export/coreg.json (class names, preprocessing).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

import coreg.nets  # noqa: F401  registers the PreAct ResNets with timm
from coreg.errors import UserError

SCHEMA = 1


def export(folder: Path, backbones: list[nn.Module], architecture: str, arguments: dict[str, Any], **settings: Any) -> None:
    """Write the backbones with their classifiers; built beside `folder` and renamed, so never half-written.

    Args:
        backbones: timm models, net1 first. architecture: their timm name. arguments: what they were created with.
        settings: `class_names`, `image_size`, `channels`, `mean`, `std`.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    size = (settings["channels"], settings["image_size"], settings["image_size"])
    for number, backbone in enumerate(backbones, start=1):
        plain = timm.create_model(architecture, num_classes=len(settings["class_names"]), in_chans=size[0], **arguments)
        # a copy in float32 on the CPU, whatever training used
        plain.load_state_dict(
            {
                k: v.detach().cpu().float().contiguous() if v.is_floating_point() else v.cpu()
                for k, v in backbone.state_dict().items()
            }
        )
        plain.pretrained_cfg = dict(plain.pretrained_cfg) | {
            "input_size": size,
            "mean": tuple(settings["mean"]),
            "std": tuple(settings["std"]),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": len(settings["class_names"]),
        }
        timm.models.save_for_hf(
            plain,
            str(temporary / f"net{number}"),
            model_config={"label_names": list(settings["class_names"])},
            model_args={"in_chans": size[0]} | arguments,
            safe_serialization=True,
        )
    (temporary / "coreg.json").write_text(
        json.dumps({"schema": SCHEMA, "nets": len(backbones)} | settings, indent=1, ensure_ascii=False) + "\n"
    )
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load_export(folder: str | Path) -> tuple[list[nn.Module], dict[str, Any]]:
    """The networks of an export in evaluation mode on the CPU, and its settings.

    Raises:
        UserError: the folder is missing, is no export, or is damaged.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / "coreg.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise UserError(
            f"{folder} is no exported model; give the export folder of a finished run, such as runs/a/export"
        ) from None
    if settings.get("schema") != SCHEMA:
        raise UserError(f"{folder} has export schema {settings.get('schema')}, this version reads {SCHEMA}; export it anew")
    nets = []
    for number in range(1, settings["nets"] + 1):
        try:
            nets.append(timm.create_model(f"local-dir:{folder / f'net{number}'}", pretrained=True).eval())
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{folder / f'net{number}'} cannot be loaded ({str(error).splitlines()[0]}); export the run anew"
            ) from None
    return nets, settings


@torch.no_grad()
def ensemble_logits(nets: list[nn.Module], images: torch.Tensor) -> torch.Tensor:
    """Sum of the networks' logits, (n, c, H, W) -> (n, C): the prediction that reports call `ensemble`."""
    return sum(net(images) for net in nets)
