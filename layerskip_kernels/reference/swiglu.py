import torch


def swiglu(gate, up, *, out=None):
    gate32 = gate.float()
    y = (gate32 * torch.sigmoid(gate32) * up.float()).to(gate.dtype)
    return y if out is None else out.copy_(y)
