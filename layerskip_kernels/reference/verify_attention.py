import torch


def verify_attention(
    q,
    k_cache,
    v_cache,
    *,
    lengths,
    scale,
    slot_ids=None,
    num_queries=None,
    tree_mask=None,
    sliding_window=None,
    block_table=None,
    out=None,
):
    batch, window, heads, _ = q.shape
    group_size = heads // k_cache.shape[1]
    out = torch.empty_like(q) if out is None else out
    out.zero_()
    for b in range(batch):
        rows = window if num_queries is None else int(num_queries[b])
        slot = b if slot_ids is None else int(slot_ids[b])
        past = int(lengths[b])
        if rows == 0:
            continue
        keys = k_cache[slot, :, : past + rows].float().repeat_interleave(group_size, dim=0)  # [H, past + rows, D]
        values = v_cache[slot, :, : past + rows].float().repeat_interleave(group_size, dim=0)
        # What a row does not see may hold anything, NaN included, so it is left out, not multiplied by zero.
        for t, seen in enumerate(visible(past, rows, tree_mask, sliding_window, q.device)):
            scores = q[b, t].float()[:, None] @ keys[:, seen].transpose(1, 2) * scale  # [H, 1, seen]
            out[b, t] = (scores.softmax(dim=-1) @ values[:, seen])[:, 0].to(q.dtype)
    return out


def visible(past, rows, tree_mask, sliding_window, device):
    """[rows, past + rows] bool: which storage positions each row of the window sees."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(past + rows, device=device)
    mask = column <= past + row
    if tree_mask is not None:
        mask = torch.cat((mask[:, :past], tree_mask[:rows, :rows]), dim=1)
    if sliding_window is not None:
        mask = mask & (column > past + row - sliding_window)
    return mask
