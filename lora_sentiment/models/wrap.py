"""Apply a method of the recipe to a base: choose the trained tensors, and freeze the others."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn.utils import parametrize

from lora_sentiment.errors import ModelError
from lora_sentiment.models.families import family_of
from lora_sentiment.models.load import Base, refuse_unquantisable
from lora_sentiment.models.targets import find_targets, find_unfrozen, resolve_pattern
from lora_sentiment.recipe.method import (
    AdaloraMethod,
    FullMethod,
    HeadMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PeftMethod,
    UnfreezeMethod,
    VeraMethod,
    why_not_quantised,
)
from lora_sentiment.recipe.model import DEFAULT_HEAD_R, ModelConfig


def make_trainable(
    base: Base, method: Method, config: ModelConfig, *, dtype: torch.dtype, num_steps: int = 1
) -> nn.Module:
    """Wrap a base with its method: trained tensors in fp32, the others frozen in `dtype`.

    The base's own model is used, not a copy. Initial values come from torch's global generator.

    Args:
        base: A freshly loaded base.
        method: The recipe's `method` section.
        config: The recipe's `model` section, which says how the head is trained.
        dtype: Compute dtype of the frozen tensors.
        num_steps: Optimizer steps of the run, over which AdaLoRA spreads its pruning.

    Returns:
        A `PeftModel` for PEFT's methods, else the base's model itself.

    Raises:
        ModelError: If the method does not fit the base or its precision.
    """
    device = next(base.model.parameters()).device
    refuse_unfit(method, config, dtype=dtype, device=device)
    match method:
        case FullMethod():
            model: nn.Module = base.model.requires_grad_(True)
        case UnfreezeMethod() | HeadMethod():
            model = base.model.requires_grad_(False)
            names = find_unfrozen(model, method) if isinstance(method, UnfreezeMethod) else []
            for name in names:
                model.get_parameter(f"{base.family.encoder}.{name}").requires_grad_(True)
        case _:
            model = _wrap(base, method, num_steps)
    _choose_head(model, config, new_layers=base.new_layers)
    head = [parameter for layer in head_layers(model).values() for parameter in layer.parameters()]
    head_ids = {id(parameter) for parameter in head}
    for parameter in model.parameters():
        # Trained tensors in half precision train badly (peft#341): small updates round away. A
        # frozen head layer is saved with the trained tensors. Quantised tensors keep their dtype.
        if parameter.is_floating_point():
            is_wide = parameter.requires_grad or id(parameter) in head_ids
            parameter.data = parameter.data.to(torch.float32 if is_wide else dtype)
    return model


def refuse_unfit(
    method: Method, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a method that cannot be trained in this precision, before anything is loaded.

    Raises:
        ModelError: With the reason and the remedy.
    """
    refuse_unquantisable(config, device)
    reason = why_not_quantised(method)
    if config.quantize != "none" and reason:
        raise ModelError(f"model.quantize={config.quantize}: {reason}; set model.quantize=none")
    uses_dora = isinstance(method, LoraMethod) and method.use_dora
    if config.quantize == "int8" and uses_dora and device.type == "cpu":
        # peft 0.21 moves the weight "back to the CPU" after it reads its norm. bitsandbytes then
        # drops the scales.
        raise ModelError(
            "model.quantize=int8: PEFT's DoRA loses the scales of int8 weights on a CPU; use nf4 "
            "or fp4"
        )
    if isinstance(method, AdaloraMethod) and dtype == torch.float16:
        raise ModelError(
            "method adalora: fp16's loss scaling skips steps that its pruning counts; set "
            "model.dtype=float32"
        )


def peft_config(base: Base, method: PeftMethod, *, num_steps: int = 1) -> PeftConfig:
    """Return PEFT's own configuration of a method on a base, the head named as saved.

    Names and patterns become full names. PEFT would look for a name in the head too, try a regular
    expression on every module, not on linears alone, and take the first pattern that matches in an
    order that a sorted file does not keep.
    """
    targets = list(find_targets(base.model, method))
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "base_model_name_or_path": base.model.name_or_path,
        "revision": base.revision,
        "target_modules": sorted(targets),
        "modules_to_save": list(base.family.saved_modules),
    }
    # Our fields are PEFT's by name; those left out are ours alone, or were turned into the common
    # ones.
    ours = {"kind", "target_modules", "loraplus_lr_ratio"}
    fields = {name: getattr(method, name) for name in type(method).model_fields if name not in ours}
    fields["layers_to_transform"] = None  # the full names are those of the chosen blocks
    match method:
        case LoraMethod():
            for field, default in (
                ("rank_pattern", method.r),
                ("alpha_pattern", method.lora_alpha),
            ):
                values = resolve_pattern(fields[field], field, targets)
                fields[field] = {
                    name: values[name] for name in targets if values.get(name, default) != default
                }
            return LoraConfig(**common, **fields)
        case AdaloraMethod():
            if method.tinit + method.tfinal >= num_steps:
                raise ModelError(
                    f"method.tinit {method.tinit} and tfinal {method.tfinal} leave no step of "
                    f"{num_steps} to prune in"
                )
            return AdaLoraConfig(**common, **fields, total_step=num_steps)
        case Ia3Method():
            prefix = f"{base.family.encoder}.{base.family.blocks}."
            feed_forward = []
            for name in targets:
                path = name.removeprefix(prefix).partition(".")[2]
                if path in base.family.feed_forward:
                    feed_forward.append(name)
            return IA3Config(**common, feedforward_modules=sorted(feed_forward))
        case VeraMethod():
            return VeraConfig(**common, **fields)


def checkpoint_activations(model: nn.Module) -> None:
    """Let each block keep its input only, and compute the rest again in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    # PEFT adds a hook for the gradient of frozen embeddings, which only reentrant checkpoints need.
    model.disable_input_require_grads()  # type: ignore[operator]


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, sorted."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def frozen_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen parameters by name, sorted."""
    return {name: p for name, p in sorted(model.named_parameters()) if not p.requires_grad}


def head_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the active head layers by name, with or without PEFT around them."""
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    layers = {}
    for name in family_of(model.config).head:
        layer = inner
        for part in name.split("."):
            layer = getattr(layer, part)
            if isinstance(layer, ModulesToSaveWrapper):
                layer = layer.modules_to_save["default"]
        layers[name] = layer
    return layers


def make_head_dense(model: nn.Module) -> None:
    """Turn a low-rank head into its dense form; answers change by rounding only."""
    for layer in head_layers(model).values():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def learning_rate_ratios(model: nn.Module, method: Method) -> dict[str, float]:
    """Return the factor of the learning rate for each trained tensor whose factor is not 1.

    LoRA+ (Hayou et al. 2024) trains every B faster than its A.
    """
    if not isinstance(method, LoraMethod) or method.loraplus_lr_ratio is None:
        return {}
    return {
        name: method.loraplus_lr_ratio for name in trainable_tensors(model) if ".lora_B." in name
    }


def penalty(model: nn.Module, method: Method) -> torch.Tensor | None:
    """Return the term that a method adds to the loss of every optimizer step, or None.

    AdaLoRA keeps both factors orthogonal. Its term is the mean of ||P P^T - I|| over them (Zhang et
    al. 2023, equation 4).
    """
    if not isinstance(method, AdaloraMethod) or not method.orth_reg_weight:
        return None
    norms = []
    for name, factor in trainable_tensors(model).items():
        if ".lora_A." in name or ".lora_B." in name:
            square = factor @ factor.T if ".lora_A." in name else factor.T @ factor
            identity = torch.eye(len(square), device=square.device)
            norms.append(torch.linalg.matrix_norm(square - identity))
    return method.orth_reg_weight * torch.stack(norms).mean()


def after_step(model: nn.Module, method: Method, *, step: int) -> None:
    """Run the method's own part of an optimizer step, before gradients are zeroed: AdaLoRA prunes.

    Args:
        model: The trained model.
        method: The recipe's `method` section.
        step: Number of the step, from 1.
    """
    if isinstance(method, AdaloraMethod):
        model.base_model.update_and_allocate(step)  # type: ignore[union-attr, operator]


def is_settled(method: Method, *, step: int, num_steps: int) -> bool:
    """Return whether the tensors of this step may be kept: AdaLoRA reaches its rank late."""
    return not isinstance(method, AdaloraMethod) or step >= num_steps - method.tfinal


def as_plain_lora(
    trained: PeftModel, start: PeftModel
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Convert an adapter that changed its base, such as PiSSA, to plain LoRA on the unchanged base.

    It trained W - s B0 A0 + s B A. On W that is an update of twice the rank: s [B, -B0] [A; A0].

    Args:
        trained: The trained model.
        start: The same method applied to the same base. A0 and B0 depend on the base alone.

    Returns:
        The changes of PEFT's configuration, and the factors by their names in `trained`. The scale
        is in B.
    """
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    initial = dict(start.named_parameters())
    for name, layer in trained.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        down, up = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        first, second = trained.get_parameter(down), trained.get_parameter(up)
        old_first, old_second = (initial[key].to(first.device) for key in (down, up))
        tensors[down] = torch.cat([first, old_first]).detach()
        scale = cast(Any, layer).scaling["default"]
        tensors[up] = (torch.cat([second, -old_second], dim=1) * scale).detach()
        ranks[name.removeprefix("base_model.model.")] = len(tensors[down])
    rank = max(ranks.values())
    others = {name: r for name, r in ranks.items() if r != rank}
    changes = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return changes, tensors


def kept_ranks(state: Mapping[str, torch.Tensor]) -> dict[str, list[bool]]:
    """Return for each module of PEFT's state which of AdaLoRA's singular values are not pruned.

    PEFT's own record is that of the last step. The kept tensors may be those of an earlier step.
    """
    return {
        name.removeprefix("base_model.model."): (value != 0).flatten().tolist()
        for name, value in state.items()
        if name.endswith(".lora_E.default")
    }


def _wrap(base: Base, method: PeftMethod, num_steps: int) -> PeftModel:
    """Wrap the base with PEFT, and check that it adapted the linears that the recipe names."""
    wanted = set(find_targets(base.model, method))
    with warnings.catch_warnings():
        # PEFT asks the model by an old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        model = get_peft_model(base.model, peft_config(base, method, num_steps=num_steps))
    assert isinstance(model, PeftModel)
    inner = model.base_model.model
    found = {name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}  # type: ignore[union-attr]
    if found != wanted:
        different = sorted(found ^ wanted)
        raise ModelError(
            f"method.target_modules {method.target_modules!r}: PEFT adapted {len(found)} linears "
            f"where {len(wanted)} were meant; they differ in {different[0]}"
        )
    return model


class _LowRankUpdate(nn.Module):
    """A weight plus a low-rank update B A; A: (r, in_features), B: (out_features, r), zero first."""

    def __init__(self, weight: torch.Tensor, r: int) -> None:
        super().__init__()
        self.A = nn.Parameter(weight.new_empty(r, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.B @ self.A


def _choose_head(model: nn.Module, config: ModelConfig, *, new_layers: tuple[str, ...]) -> None:
    """Freeze the part of the head that is not trained.

    A new frozen layer is the identity: random values would mix the encoder's features.
    """
    layers = head_layers(model)
    for layer in layers.values():
        layer.requires_grad_(True)
    if config.head == "full":
        return
    name, *between = list(layers)[:-1]
    first: Any = layers[name]
    if name in new_layers:
        nn.init.eye_(first.weight)
        if first.bias is not None:
            nn.init.zeros_(first.bias)
    for other in between:  # a norm, which begins as the identity
        layers[other].requires_grad_(False)
    if config.head == "classifier":
        first.requires_grad_(False)
        return
    first.weight.requires_grad_(False)
    rank = config.head_r or DEFAULT_HEAD_R
    if rank > min(first.weight.shape):
        raise ModelError(f"model.head_r: found {rank}; allowed: 1 to {min(first.weight.shape)}")
    parametrize.register_parametrization(first, "weight", _LowRankUpdate(first.weight, rank))
