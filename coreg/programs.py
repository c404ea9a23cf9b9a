"""An ensemble as a program in one file: ONNX, or PyTorch's own exported programs."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coreg.errors import UserError

Kind = Literal["onnx", "torch_export"]
# what a program says about itself: enough to decode images for it and to name its classes
TOLD = ("class_names", "image_size", "channels")


def write_program(ensemble: nn.Module, settings: dict[str, Any], kind: Kind, path: Path) -> Callable[[Tensor], Tensor]:
    """Write the ensemble as one file, with the settings `TOLD` inside; gives what reads the file back.

    ONNX has them as metadata `coreg`, an exported program as the extra file `coreg.json`, both as JSON.

    Args:
        ensemble: uint8 (n, c, H, W) -> logits and probabilities (n, C), on the CPU in evaluation mode.

    Returns:
        uint8 images on the CPU -> logits, computed by the file.

    Raises:
        UserError: packages for it are missing, or the networks hold something that it cannot express.
    """
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _require(package)
    size = settings["image_size"]
    example = torch.zeros(2, settings["channels"], size, size, dtype=torch.uint8)
    told = json.dumps({name: settings[name] for name in TOLD})
    try:
        # traced without gradients, or the program would carry what a backward pass needs
        with torch.no_grad():
            program = torch.export.export(ensemble, (example,), dynamic_shapes={"images": {0: torch.export.Dim("n")}})
            return (_save_onnx if kind == "onnx" else _save_torch)(program, told, path)
    except (RuntimeError, ValueError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
        raise UserError(f"these networks cannot be written as {kind} ({str(error).strip().splitlines()[0]})") from None


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"ONNX needs the package {package}; type: pip install onnx onnxscript onnxruntime") from None


def _save_torch(program: torch.export.ExportedProgram, told: str, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(program, str(path), extra_files={"coreg.json": told})
    module = torch.export.load(str(path)).module()
    return lambda images: module(images)[0]


def _save_onnx(program: torch.export.ExportedProgram, told: str, path: Path) -> Callable[[Tensor], Tensor]:
    # the exporter reports its stages on stdout, whatever it is told
    with contextlib.redirect_stdout(None):
        onnx = torch.onnx.export(
            program, input_names=["images"], output_names=["logits", "probabilities"], dynamo=True, verbose=False
        )
    onnx.model.metadata_props["coreg"] = told
    onnx.save(str(path), external_data=False)
    session = open_onnx(path.read_bytes(), gpu=False)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def open_onnx(model: bytes, gpu: bool) -> Any:
    """An `onnxruntime.InferenceSession`; with `gpu` on a GPU, where this onnxruntime can use one.

    From memory, so that a file from elsewhere cannot name further files as its weights.

    Raises:
        UserError: onnxruntime is missing, or the bytes are no ONNX model.
    """
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised, and once is enough
    cuda = ["CUDAExecutionProvider"] if gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers() else []
    try:
        return onnxruntime.InferenceSession(model, options, providers=[*cuda, "CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise UserError(f"the file is no ONNX model that can be run ({str(error).splitlines()[0]})") from None
