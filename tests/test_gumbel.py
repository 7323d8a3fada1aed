"""The coupled noise of `exit_head`: published vectors for Philox, plain Python integers for the rest."""

import math

import pytest
import torch

from layerskip_kernels.reference.gumbel import gumbel_noise
from layerskip_kernels.reference.philox import philox

MASK = 2**32 - 1

# Known answers of Philox4x32-10 from the authors' Random123 distribution: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    words = philox([torch.tensor(w) for w in hexadecimal(counter)], [torch.tensor(w) for w in hexadecimal(key)])
    assert [int(w) for w in words] == hexadecimal(output)
    assert python_philox(hexadecimal(counter), hexadecimal(key)) == hexadecimal(output)


def python_philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def python_gumbel(seed, stream, position, token):
    seed, stream, position = (v % 2**64 for v in (seed, stream, position))
    high = stream >> 32
    rotated = (high << 16 | high >> 16) & MASK
    counter = (token // 4, position & MASK, stream & MASK, position >> 32 ^ rotated)
    word = python_philox(counter, (seed & MASK, seed >> 32))[token % 4]
    v = min((word + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -math.log(-math.log1p(-v))


@pytest.mark.parametrize("vocab", [1, 6, 83])
def test_equals_plain_python(vocab):
    """Negative and 64-bit seeds, streams and positions included."""
    rows = [(0, 0, 0), (1, 2, 3), (-1, -2, 7), (2**40 + 5, 2**35 + 1, 2**33), (-(2**63), 2**63 - 1, 131071)]
    seed, stream, position = torch.tensor(rows).T
    noise = gumbel_noise(seed, stream, position, vocab)
    expected = torch.tensor([[python_gumbel(*row, token) for token in range(vocab)] for row in rows])
    assert noise.dtype == torch.float32 and noise.shape == (5, vocab)
    torch.testing.assert_close(noise, expected, atol=2e-6, rtol=2e-6)


def test_every_coordinate_matters():
    base = dict(seed=5, stream=6, position=7)
    changes = [{}] + [{name: base[name] + step} for name in base for step in (1, 2**32, -(2**33))]
    rows = [{**base, **change} for change in changes]
    columns = [torch.tensor([row[name] for row in rows]) for name in base]
    noise = gumbel_noise(*columns, 16)
    assert len({tuple(row) for row in noise.tolist()}) == len(rows)


def test_is_standard_gumbel():
    position = torch.arange(4096)
    zeros = torch.zeros_like(position)
    noise = gumbel_noise(zeros, zeros, position, 64).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772157) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    for x in (-1.0, 0.0, 1.0, 4.0):
        assert abs((noise <= x).double().mean() - math.exp(-math.exp(-x))) < 0.004
