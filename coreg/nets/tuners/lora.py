"""Low-rank adapters (Hu et al., "LoRA", ICLR 2022) through PEFT: where they go, a proof that they act, files.

An adapter that no forward pass reads trains nothing and says nothing: LoRA on the output projection of
`torch.nn.MultiheadAttention`, whose weight is read past its forward, on layers whose output is thrown away, or on the
unused tower of a model with two. So adapters are put on what was seen working, and each is proven to act.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from coreg.errors import UserError
from coreg.files import making_folder

# attention's projections of its input, by the names that timm, open_clip and transformers give them
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv", "q", "k", "v", "query", "key", "value")
PROBE_STD = 0.05  # of what is put in the place of zeros while adapters are proven to act


def modules_at_work(network: nn.Module, run: Callable[[], object]) -> dict[str, nn.Module]:
    """The parts of `network` whose forward is called when `run` is, by name."""
    seen: dict[str, nn.Module] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, *_: seen.setdefault(name, module) and None

    hooks = [part.register_forward_pre_hook(note(name)) for name, part in network.named_modules() if name]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def attention_targets(network: nn.Module, run: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Queries', keys' and values' projections in the attention layers that `run` calls.

    Returns:
        names of linear layers; names of parameters that hold all three projections in one (`in_proj_weight`).
    """
    layers, parameters = [], []
    for name, part in modules_at_work(network, run).items():
        if isinstance(getattr(part, "in_proj_weight", None), nn.Parameter):
            parameters.append(f"{name}.in_proj_weight")
        elif isinstance(part, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
            layers.append(name)
    return layers, parameters


def decoder_targets(network: nn.Module) -> list[str]:
    """Names of all linear layers of a chat model's language model, its output layer left out."""
    table = network.get_input_embeddings()
    (name,) = (name for name, part in network.named_modules() if part is table)
    decoder = name.rpartition(".")[0]
    inside = network.get_submodule(decoder).named_modules()
    return [f"{decoder}.{name}" for name, part in inside if isinstance(part, nn.Linear)]


def attach(
    network: nn.Module,
    layers: Sequence[str],
    parameters: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool,
    base: str,
) -> PeftModel:
    """Put adapters into `network`, in place and without changing its outputs, and let them alone be trained.

    A packed `in_proj_weight` gets one adapter for queries, keys and values: they share A, and have rows of B of their own.
    PEFT's adapter for the whole attention layer is not used: it adds itself to the frozen weights and takes itself away
    in every forward pass, and rounding makes them drift.

    Args:
        layers, parameters: names of linear layers and of parameters of two dimensions.
        dropout: of the adapters' input; only linear layers have one.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank. base: the model's spec, for the saved adapter.

    Raises:
        UserError: `dropout` with packed projections.
    """
    if parameters and dropout:
        raise UserError(
            f"--dropout is {dropout}, and {parameters[0]} holds queries, keys and values in one weight, whose adapter "
            "cannot have dropout; leave it at 0"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=list(layers),
        target_parameters=list(parameters) or None,
    )
    with warnings.catch_warnings():
        # without linear layers to adapt, PEFT remarks that none was matched
        warnings.filterwarnings("ignore", message="target_modules=.* no module was matched")
        adapted = get_peft_model(network, config)
    config.base_model_name_or_path = base
    wanted, adapted_parts = {*layers, *(name.rpartition(".")[0] for name in parameters)}, set()
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            part = name.removeprefix("base_model.model.").partition(".lora_")[0]
            adapted_parts.add(part)
            # PEFT reads a name as the end of a name, and so takes `visual.transformer` for `transformer` too; what it puts
            # there stays zero
            weight.requires_grad_(part in wanted)
        assert "lora_" in name or not weight.requires_grad, f"{name} is no adapter's and would be trained"
    assert wanted and wanted <= adapted_parts, f"without an adapter: {sorted(wanted - adapted_parts)[:3]}"
    return adapted


def dead_parameters(weights: dict[str, nn.Parameter], output: Callable[[], Tensor]) -> list[str]:
    """Names of the parameters on which `output` does not depend.

    The gradient of a random projection of the output is examined. An adapter starts with B = 0, where that of A is zero
    too; so zeros are replaced by noise for the moment. Values, gradients and random generators are left as they were.

    Args:
        output: a tensor of any shape, with gradient.
    """
    devices = {weight.device for weight in weights.values() if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), _without_zeros(weights):
        given = output()
        if not given.requires_grad:
            return list(weights)
        gradients = torch.autograd.grad((given * torch.randn_like(given)).sum(), list(weights.values()), allow_unused=True)
    return [name for name, gradient in zip(weights, gradients) if gradient is None or not gradient.any()]


@contextmanager
def _without_zeros(weights: dict[str, nn.Parameter]) -> Iterator[None]:
    zero = [weight for weight in weights.values() if not weight.any()]
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in zero:
            weight.normal_(0, PROBE_STD)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zero:
                weight.zero_()


def refuse_dead(weights: dict[str, nn.Parameter], output: Callable[[], Tensor]) -> None:
    """Raise a UserError where `output` does not depend on one of `weights` (see `dead_parameters`)."""
    dead = dead_parameters(weights, output)
    if dead:
        raise UserError(
            f"{len(dead)} of {len(weights)} adapter weights change nothing that the model says, such as {dead[0]}: they "
            "would never be trained; adapt another tower with --towers, or choose another model with --vlm"
        )


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which `PeftModel.from_pretrained` reads, or nothing.

    Raises:
        UserError: they cannot be written.
    """
    with making_folder(folder, replace=True) as temporary:
        # left to itself, PEFT asks the hub whether the base model's vocabulary was another one
        adapted.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # an empty form
