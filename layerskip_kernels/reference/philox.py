"""Philox4x32-10, the counter-based generator (Salmon et al., SC 2011, doi 10.1145/2063384.2063405)."""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter, key):
    """Ten rounds. counter: 4, key: 2, result: 4 broadcastable int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits, wrapping; the mask undoes the sign
        high0, high1 = product0 >> 32 & _LOW, product1 >> 32 & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW, high0 ^ c3 ^ k1, product0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)


def words(value):
    """The low and high 32 bits of an int64 tensor."""
    return value & _LOW, value >> 32 & _LOW
