from triton_compile import Case

from layerskip_kernels.triton.early_exit_cross_entropy import BLOCK, early_exit_gradient_kernel, early_exit_loss_kernel

POINTERS = ("logits_ptr", "losses_ptr", "divergences_ptr", "log_sums_ptr", "weights_ptr")
SCALARS = ("logit_scale", "softcap", "temperature", "distill_weight")


def case(fn, name, gradient="fp32", *, capped=False, distill=False):
    types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(SCALARS, "fp32")
    types |= dict(labels_ptr="*i64", gradient_ptr=f"*{gradient}")
    constexprs = dict(CAPPED=capped, DISTILL=distill, ROWS=1, BLOCK=BLOCK)
    return Case(
        name=f"{name} {gradient}{' capped' * capped}{' distilled' * distill}",
        fn=fn,
        signature={n: types.get(n, "i32") for n in fn.arg_names if n not in constexprs},
        constexprs=constexprs,
        divisible=tuple(n for n in fn.arg_names if n.endswith("_ptr")),
        num_warps=8,
    )


CASES = [
    case(early_exit_loss_kernel, "loss"),
    case(early_exit_loss_kernel, "loss", capped=True, distill=True),
    case(early_exit_gradient_kernel, "gradient", "bf16"),
    case(early_exit_gradient_kernel, "gradient", "fp32", capped=True, distill=True),
]
