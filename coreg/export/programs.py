"""An ensemble as a program in one file: ONNX, or PyTorch's own exported programs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coreg.errors import UserError
from coreg.export.folder import ABOUT, check_about
from coreg.plaintext import first_line
from coreg.records import RecordError, parse_record

Kind = Literal["onnx", "torch_export"]
# the entry of an ONNX file's metadata that says so, and the last one, which has the SHA-256 of all bytes before it
SEALED, SEAL = "sealed", "sha256"


def as_program(ensemble: nn.Module, settings: dict[str, Any], kind: Kind) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """The ensemble as the content of one file, with the settings `ABOUT` inside, and what the file computes.

    ONNX has them as metadata `coreg`, an exported program as the extra file `coreg.json`, both as JSON. In memory and not
    in a file: PyTorch ends the whole process where a disk is full.

    Args:
        ensemble: uint8 (n, c, H, W) -> logits and probabilities (n, C), on the CPU in evaluation mode.

    Returns:
        the content; uint8 images on the CPU -> logits, computed from it.

    Raises:
        UserError: packages for it are missing, or the networks hold something that it cannot express.
    """
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _require(package)
    size = settings["image_size"]
    example = torch.zeros(2, settings["channels"], size, size, dtype=torch.uint8)
    about = {name: settings[name] for name in ABOUT if name in settings}
    try:
        # traced without gradients, or the program would carry what a backward pass needs
        with torch.no_grad():
            program = torch.export.export(ensemble, (example,), dynamic_shapes={"images": {0: torch.export.Dim("n")}})
            return (_as_onnx if kind == "onnx" else _as_torch)(program, about)
    except (RuntimeError, ValueError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
        raise UserError(f"these networks cannot be written as {kind} ({first_line(error)})") from None


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"ONNX needs the package {package}; type: pip install onnx onnxscript onnxruntime") from None


def _as_torch(program: torch.export.ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"coreg.json": json.dumps(about)})
    module = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda images: module(images)[0]


def _as_onnx(program: torch.export.ExportedProgram, about: dict[str, Any]) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    # the exporter reports its stages on stdout, even with verbose=False
    with contextlib.redirect_stdout(None):
        onnx = torch.onnx.export(
            program, input_names=["images"], output_names=["logits", "probabilities"], dynamo=True, verbose=False
        )
    onnx.model.metadata_props["coreg"] = json.dumps(about | {SEALED: True})
    body = onnx.model_proto.SerializeToString()
    content = body + _seal(body)
    session = open_onnx(content, "the ONNX program", gpu=False)[0]
    return content, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


# ---- reading --------------------------------------------------------------------------------------------------------


def _seal(body: bytes) -> bytes:
    """The bytes of one more entry of the metadata; what is appended to a serialised message is merged into it."""
    import onnx

    entry = onnx.StringStringEntryProto(key=SEAL, value=hashlib.sha256(body).hexdigest())
    return onnx.ModelProto(metadata_props=[entry]).SerializeToString()


def _names_files(message: Any) -> bool:
    """Whether a protobuf message, or one within it, is a tensor whose values are in another file."""
    if message.DESCRIPTOR.name == "TensorProto" and (message.external_data or message.data_location):
        return True
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE and any(
            _names_files(inner) for inner in ([value] if hasattr(value, "ListFields") else value)
        ):
            return True
    return False


def open_onnx(model: bytes, name: str, gpu: bool) -> tuple[Any, dict[str, Any]]:
    """An ONNX model that coreg-export made, of which no byte has changed and which needs no further file.

    Args:
        model: content of the file. name: of the file, for messages. gpu: use one, where this onnxruntime can.

    Returns:
        an `onnxruntime.InferenceSession`; the settings `ABOUT`.

    Raises:
        UserError: packages for it are missing, or it is something else.
    """
    for package in ("onnx", "onnxruntime"):
        _require(package)
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised, and once is enough
    # of the two formats that it reads, the one that was checked
    options.add_session_config_entry("session.load_model_format", "ONNX")
    cuda = ["CUDAExecutionProvider"] if gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers() else []
    try:
        message = onnx.ModelProto.FromString(model)
        if _names_files(message):
            raise RecordError("its weights are in other files; coreg-export writes everything into one")
        metadata = {entry.key: entry.value for entry in message.metadata_props}
        if "coreg" not in metadata:
            raise RecordError("it has no class names inside")
        about = parse_record(metadata["coreg"])
        body = model[: -len(_seal(b""))]
        # files of older versions have no seal
        if (SEALED in about or SEAL in metadata) and model != body + _seal(body):
            raise RecordError("it does not agree with its checksum: it is damaged, or another program changed it")
        check_about(about)
        return onnxruntime.InferenceSession(model, options, providers=[*cuda, "CPUExecutionProvider"]), about
    except Exception as error:  # those of onnxruntime and of protobuf have no common base class
        reason = first_line(error)
        raise UserError(f"{name} is no ONNX model that coreg-export wrote ({reason}); write it anew with it") from None
