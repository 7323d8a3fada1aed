import torch


def rotate(x, cos, sin):
    """x [T, heads, D] rotated by cos, sin [T, D/2]: element i is paired with i + D/2."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_append(
    q,
    k,
    v,
    k_cache,
    v_cache,
    *,
    lengths,
    positions,
    inv_freq,
    attention_factor=1.0,
    slot_ids=None,
    num_queries=None,
    block_table=None,
):
    batch, window = positions.shape
    angles = positions[..., None].float() * inv_freq  # [B, T, D/2]
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    for b in range(batch):
        rows = window if num_queries is None else int(num_queries[b])
        slot = b if slot_ids is None else int(slot_ids[b])
        start = int(lengths[b])
        q[b, :rows] = rotate(q[b, :rows], cos[b, :rows], sin[b, :rows])
        k_cache[slot, :, start : start + rows] = rotate(k[b, :rows], cos[b, :rows], sin[b, :rows]).transpose(0, 1)
        v_cache[slot, :, start : start + rows] = v[b, :rows].transpose(0, 1)
