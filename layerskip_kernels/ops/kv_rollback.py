from __future__ import annotations

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.registry import resolve


def kv_rollback(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    keep: torch.Tensor,
    *,
    slot_ids: torch.Tensor | None = None,
    path: torch.Tensor | None = None,
    window: int,
    scrub: bool = False,
    block_table: torch.Tensor | None = None,
) -> None:
    """Keep `keep` positions of each sequence's window in every layer, drop the rest: ``lengths += keep``, in place.

    The only writer of `lengths`. For a chain of drafts the dropped positions simply lie behind the new length. For a
    tree, `path` names the window rows of the accepted branch: row ``path[b, i]`` moves to row i, in all layers, all
    reads before any write.

    Args:
        k_cache, v_cache: [L, slots, G, S, D] float32, float16 or bfloat16, the whole model's cache.
        lengths: [B] int32, valid positions before the window; updated in place.
        keep: [B] int32 in 0..window.
        slot_ids: [B] int32; None: row i in slot i.
        path: [B, window] int32, entries at and beyond keep are ignored; None: a chain, ``path[b, i] = i``.
        window: T, positions that the round wrote.
        scrub: zero the dropped positions ``[lengths + keep, lengths + window)``.
        block_table: reserved for paged caches.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or range.
    """
    _check.tensor("k_cache", k_cache, (None,) * 5, dtype=_check.FLOATS)
    _check.tensor("v_cache", v_cache, tuple(k_cache.shape), dtype=k_cache.dtype, like=k_cache)
    _check.tensor("lengths", lengths, (None,), dtype=torch.int32, like=k_cache)
    batch = lengths.shape[0]
    _check.tensor("keep", keep, (batch,), dtype=torch.int32, like=k_cache)
    _check.slots(slot_ids, batch, k_cache.shape[1], k_cache)
    _check.between("window", window, 1, k_cache.shape[3])
    _check.optional("path", path, (batch, window), dtype=torch.int32, like=k_cache)
    _check.no_paging(block_table)
    if torch.compiler.is_compiling():
        torch.ops.layerskip_kernels.kv_rollback(k_cache, v_cache, lengths, keep, window, slot_ids, path, scrub)
        return
    resolve("kv_rollback", k_cache.device, k_cache.dtype)(
        k_cache, v_cache, lengths, keep, slot_ids=slot_ids, path=path, window=window, scrub=scrub
    )


_library.register(
    "kv_rollback(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) lengths, Tensor keep, int window, "
    "Tensor? slot_ids=None, Tensor? path=None, bool scrub=False) -> ()",
    lambda k_cache, v_cache, lengths, keep, window, slot_ids=None, path=None, scrub=False: kv_rollback(
        k_cache, v_cache, lengths, keep, slot_ids=slot_ids, path=path, window=window, scrub=scrub
    ),
    lambda *args, **kwargs: None,
)
