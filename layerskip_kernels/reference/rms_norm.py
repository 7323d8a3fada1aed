import torch


def rms_norm(x, weight, eps, *, residual=None, out=None):
    if residual is not None:
        x = residual.copy_(residual.float() + x.float())
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.to(x.dtype) if out is None else out.copy_(normed)
