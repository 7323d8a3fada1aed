"""Which exits are trained at a step (section 4.1.2 of the paper). Steps are optimizer steps, the same on every rank."""

from __future__ import annotations

CURRICULA = ("all", "rotational", "gradual")


def rotational(step: int, num_layers: int, interval: int, *, include_last: bool = True) -> tuple[int, ...]:
    """Every `interval`-th layer, shifted by one each step; ⌈L / interval⌉ of them at most.

    Args:
        step: from 0.
        num_layers: L.
        interval: R in 1..L.
        include_last: also layer L - 1, so that no step leaves the model's own output untrained. False: as the paper
            counts, one unembedding fewer.
    """
    if not 1 <= interval <= num_layers:
        raise ValueError(f"interval={interval}: the model has {num_layers} layers, choose 1..{num_layers}")
    layers = set(range(step % interval, num_layers, interval))
    return tuple(sorted(layers | {num_layers - 1} if include_last else layers))


def gradual(step: int, num_layers: int, total_steps: int) -> tuple[int, ...]:
    """Layer L - 1 alone at step 0, one more below it every T / 2L steps; all of them in the second half.

    Args:
        step: t, from 0.
        num_layers: L.
        total_steps: T.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps}: must be >= 1")
    first = num_layers - 1 - 2 * num_layers * step // total_steps
    return tuple(range(max(first, 0), num_layers))


def enabled_exits(
    curriculum: str, step: int, num_layers: int, total_steps: int, *, interval: int = 1, include_last: bool = True
) -> tuple[int, ...]:
    """The layers whose exits are trained at `step`, ascending. `curriculum`: "all", "rotational" or "gradual"."""
    if curriculum == "all":
        return tuple(range(num_layers))
    if curriculum == "rotational":
        return rotational(step, num_layers, interval, include_last=include_last)
    if curriculum == "gradual":
        return gradual(step, num_layers, total_steps)
    raise ValueError(f"curriculum={curriculum!r}: choose {', '.join(CURRICULA)}")
