"""The early-exit loss (section 4.1.2 of the paper): enabled exits through the shared final norm and LM head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from layerskip_kernels.ops import early_exit_cross_entropy
from layerskip_kernels.training.parts import ModelParts, model_parts

IGNORE = -100  # transformers' label of what is not a target


class EarlyExitOutput(NamedTuple):
    loss: Tensor  # []: weighted over the exits
    layers: tuple[int, ...]  # the exits that were trained: those enabled, less those of weight 0
    exit_losses: Tensor  # [exits]: cross entropy of each, for the log


def exit_weights(num_layers: int, e_scale: float) -> list[float]:
    """e(l), not normalised: e_scale · Σ_{i≤l} i below the last layer, L - 1 + e_scale · Σ_{i≤L-2} i for it."""
    if not e_scale >= 0:
        raise ValueError(f"e_scale={e_scale}: must be >= 0")
    sums = [layer * (layer + 1) / 2 for layer in range(num_layers)]
    return [e_scale * s for s in sums[:-1]] + [num_layers - 1 + e_scale * sums[num_layers - 2] * (num_layers > 1)]


def normalised_weights(
    layers: Sequence[int], num_layers: int, e_scale: float, focus: int | None = None, focus_weight: float = 0.0
) -> dict[int, float]:
    """Weight by enabled layer, summing to 1. Layers of weight 0 are left out, they would cost and teach nothing;
    where no other is enabled, the last layer is trained. Layer `focus` has `focus_weight` whatever else is enabled."""
    weights = exit_weights(num_layers, e_scale)
    chosen = {layer: weights[layer] for layer in layers if weights[layer] and layer != focus}
    chosen = chosen or {num_layers - 1: 1.0}
    share = (1 - focus_weight) / sum(chosen.values())
    chosen = {layer: weight * share for layer, weight in chosen.items()}
    if focus is not None and focus_weight:
        chosen[focus] = focus_weight
    return dict(sorted(chosen.items()))


def early_exit_loss(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    layers: Sequence[int],
    e_scale: float,
    num_items: Tensor | float | None = None,
    distill_weight: float = 0.0,
    distill_temperature: float = 1.0,
    chunk_size: int | None = None,
    focus: int | None = None,
    focus_weight: float = 0.0,
) -> EarlyExitOutput:
    """Runs `model` once and returns the weighted loss of its exits.

    Args:
        model: a supported transformers causal language model, plain or wrapped (DistributedDataParallel, PEFT).
        inputs: what the model takes (`input_ids` [B, P], `attention_mask`, ...) and `labels` [B, P], -100 where there
            is no target; or `shift_labels` [B, P], already moved one to the left.
        layers: exits to train, in 0..L-1.
        e_scale: of `exit_weights`, >= 0.
        num_items: divisor of the sum over tokens; None: the number of targets of this call.
        distill_weight, distill_temperature, chunk_size: of `ops.early_exit_cross_entropy`. The teacher is the last
            layer, which distillation therefore adds to `layers`.
        focus, focus_weight: a layer below L-1 that is trained too, with this share of the loss, in [0, 1). Not in the
            paper, whose weights leave little to exits this low.
    """
    parts = model_parts(model)
    count = len(parts.layers)
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"layers: {layer} is not a layer of the model, choose 0..{count - 1}")
    if focus is not None and not 0 <= focus < count - 1:
        raise ValueError(f"focus={focus}: the model has {count} layers, choose 0..{count - 2}")
    if not 0 <= focus_weight < 1:
        raise ValueError(f"focus_weight={focus_weight}: choose 0 or more, below 1")
    layers = {*layers, count - 1} if distill_weight else layers
    weights = normalised_weights(layers, count, e_scale, focus, focus_weight)
    inputs = dict(inputs)
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shifted is None:
        if labels is None:
            raise ValueError("inputs: no labels, expected labels [B, P] or shift_labels [B, P]")
        shifted = nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:]

    with _captured(parts, weights) as hidden:
        # One position is enough: the exits make their own logits, in chunks.
        outputs = model(**inputs, use_cache=False, logits_to_keep=1)
    weight = parts.lm_head.weight
    normed = [hidden[layer] if layer == count - 1 else parts.norm(hidden[layer]) for layer in weights]
    loss, exit_losses = early_exit_cross_entropy(
        [h.to(weight.dtype).reshape(-1, h.shape[-1]) for h in normed],
        weight,
        shifted.reshape(-1),
        list(weights.values()),
        ignore_index=IGNORE,
        num_items=num_items,
        distill_weight=distill_weight,
        distill_temperature=distill_temperature,
        chunk_size=chunk_size,
    )
    if count - 1 not in weights and isinstance(model, nn.parallel.DistributedDataParallel):
        # The reducer waits for every parameter its forward has used, also those above the highest enabled exit.
        loss = loss + 0.0 * outputs.logits.sum()
    return EarlyExitOutput(loss, tuple(weights), exit_losses)


@contextmanager
def _captured(parts: ModelParts, layers: Sequence[int]):
    """Within the block, collects by layer what these layers return, for the last one what the final norm returns."""
    hidden: dict[int, Tensor] = {}
    last = len(parts.layers) - 1

    def keep(layer: int) -> Callable:
        def hook(module, args, output):
            hidden[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        (parts.norm if layer == last else parts.layers[layer]).register_forward_hook(keep(layer)) for layer in layers
    ]
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()
