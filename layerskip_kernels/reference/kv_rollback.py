import torch


def kv_rollback(k_cache, v_cache, lengths, keep, *, slot_ids=None, path=None, window, scrub=False, block_table=None):
    for b in range(lengths.shape[0]):
        slot = b if slot_ids is None else int(slot_ids[b])
        start, kept = int(lengths[b]), int(keep[b])
        for cache in (k_cache, v_cache):
            rows = cache[:, slot, :, start : start + window]  # [L, G, T, D]
            if path is not None:
                rows[:, :, :kept] = torch.index_select(rows, 2, path[b, :kept].long())
            if scrub:
                rows[:, :, kept:] = 0
    lengths += keep
