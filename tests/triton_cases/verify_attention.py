import torch
from triton_compile import Case

from layerskip_kernels.triton.verify_attention import (
    choose,
    merge_constexprs,
    split_constexprs,
    verify_attention_merge_kernel,
    verify_attention_split_kernel,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = dict.fromkeys(("lengths_ptr", "slot_ids_ptr", "num_queries_ptr"), "*i32") | dict(tree_ptr="*i1", scale="fp32")


def case(part, kind, dim, heads, groups, *, tree=False, ragged=True, aligned=True):
    config = choose(heads, groups, dim, DTYPES[kind])
    own = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    scratch = ("partial_ptr", "stats_ptr")
    absent = ({} if tree else dict(tree_ptr=None)) | ({} if ragged else dict(slot_ids_ptr=None, num_queries_ptr=None))
    if part == "split":
        fn, warps = verify_attention_split_kernel, config["num_warps"]
        vector = 16 // DTYPES[kind].itemsize if aligned else 1
        constexprs = split_constexprs(heads, groups, dim, vector, vector, config)
    else:
        fn, warps, constexprs = verify_attention_merge_kernel, 4, merge_constexprs(heads, dim, tree, config)
    constexprs |= {name: None for name in absent if name in fn.arg_names}
    types = TYPES | dict.fromkeys(own, f"*{kind}") | dict.fromkeys(scratch, "*fp32")
    return Case(
        name=f"{part} {kind} D={dim} H={heads} G={groups}{' tree' * tree}{'' if aligned else ' unaligned'}",
        fn=fn,
        signature={n: types.get(n, "i32") for n in fn.arg_names if n not in constexprs},
        constexprs=constexprs,
        divisible=tuple(n for n in (*own, *scratch) if n in fn.arg_names) if aligned else scratch,
        num_warps=warps,
        num_stages=config["num_stages"],
        mma=part == "split" and kind != "fp32",
        wide=aligned and part == "split",
        # Each element's offset is kept, and nine do not fit: read back once per chunk, not per tile. More warps would
        # make room, and another order of sums than aligned caches have.
        stack=0 if aligned else 56,
    )


CASES = [
    case("split", "bf16", 64, 32, 8),
    case("split", "bf16", 80, 32, 32),
    case("split", "fp16", 96, 32, 32, ragged=False),
    case("split", "bf16", 128, 32, 8),
    case("split", "bf16", 128, 64, 8, tree=True),
    case("split", "bf16", 256, 8, 1),
    case("split", "fp32", 128, 32, 8),
    case("split", "bf16", 72, 9, 3, aligned=False),
    case("merge", "bf16", 64, 32, 8),
    case("merge", "bf16", 128, 32, 8, ragged=False),
    case("merge", "fp16", 256, 8, 1, tree=True),
]
