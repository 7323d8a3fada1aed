import torch
import triton
from triton_compile import Case

from layerskip_kernels.triton.exit_head import choose_kernel, exit_head_kernel
from layerskip_kernels.triton.linear_tile import MAX_TILES, tile_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = ("temperature_ptr", "top_p_ptr", "min_p_ptr")
LONGS = ("seed_ptr", "position_ptr", "stream_ptr", "top_k_ptr")
SIZES = ("rows", "V", "chunks", "stride_x", "stride_w", "stride_logits", "stride_seen", "share")
FILTERS = ("HAS_TOP_K", "HAS_TOP_P", "HAS_MIN_P")
SCRATCH = dict(partial_ptr="*fp32", best_token_ptr="*i32", logits_ptr="*fp32", perturbed_ptr="*fp32")
PENALTY = dict(factor_ptr="*fp32", seen_ptr="*u8", window_ptr="*u8")
SETTINGS = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(LONGS, "*i64")


def signature(fn, **kinds: str) -> dict[str, str]:
    kinds = {**SCRATCH, **SETTINGS, **dict.fromkeys(SIZES, "i32"), **kinds}
    return {name: kinds[name] for name in fn.arg_names if name in kinds}


def head(kind: str, vocab: int, width: int, tiles: int, draw: str, penalty: bool = False) -> Case:
    """draw: "greedy", "sampled" or "filtered"."""
    config = tile_config(vocab, width, DTYPES[kind], 132, tiles)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    aligned = width % 16 == 0
    switches = dict(HAS_BIAS=not aligned, HAS_SOFTCAP=not aligned, HAS_PENALTY=penalty, HAS_STREAM=True)
    switches["SAMPLED"] = draw != "greedy"
    kinds = dict(x_ptr=f"*{kind}", w_ptr=f"*{kind}", bias_ptr=f"*{kind}", logit_scale="fp32", softcap="fp32")
    types = signature(exit_head_kernel, **kinds, **PENALTY)
    unused = {"bias_ptr": None} if aligned else {}
    if not penalty:
        unused |= dict.fromkeys(PENALTY)
    if draw != "filtered":
        unused |= dict.fromkeys(("perturbed_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "logits_ptr"))
    if draw == "greedy":
        unused |= dict.fromkeys(("temperature_ptr", "seed_ptr", "position_ptr", "stream_ptr"))
    types = {name: kind for name, kind in types.items() if name not in unused}
    return Case(
        name=f"{kind}, V={vocab}, C={width}, {tiles} products, {draw}{', penalty' if penalty else ''}",
        fn=exit_head_kernel,
        signature=types,
        constexprs=dict(C=width, KEEP_LOGITS=False, TILES=tiles, UNIT=16 // DTYPES[kind].itemsize if aligned else 1)
        | dict.fromkeys(FILTERS, draw == "filtered") | switches | config | unused,
        divisible=tuple(name for name, kind in types.items() if kind.startswith("*")),
        mma=kind != "fp32",
        wide=aligned,
        stack=48 if penalty and draw == "filtered" else 0 if aligned else 8,  # with Triton 3.6; on sm_100
        **options,
    )  # fmt: skip


def choose(vocab: int, chunks: int, filters: bool) -> Case:
    types = signature(choose_kernel, token_ptr="*i64", logprob_ptr="*fp32", confidence_ptr="*fp32")
    unused = {}
    if not filters:
        unused = dict.fromkeys((*FLOATS, "top_k_ptr", "logits_ptr", "perturbed_ptr"))
    types = {name: kind for name, kind in types.items() if name not in unused}
    return Case(
        name=f"choose, {chunks} chunks, {'filtered' if filters else 'plain'}",
        fn=choose_kernel,
        signature=types,
        constexprs=dict.fromkeys(FILTERS, filters)
        | dict(CHUNKS=triton.next_power_of_2(chunks), ROWS=1, BLOCK=4096)
        | unused,
        divisible=tuple(name for name, kind in types.items() if kind.startswith("*")),
        num_warps=16 if filters else 4,
    )


CASES = [
    head("bf16", 128256, 2048, 1, "greedy"),
    head("bf16", 128256, 4096, 1, "sampled"),
    head("bf16", 128256, 4096, MAX_TILES, "greedy"),
    head("fp16", 256000, 8192, 1, "filtered"),
    head("bf16", 256000, 4096, MAX_TILES, "filtered"),
    head("bf16", 151936, 896, 1, "greedy", penalty=True),
    head("bf16", 151936, 4096, MAX_TILES, "filtered", penalty=True),
    head("bf16", 5125, 769, 1, "sampled"),
    head("fp32", 49152, 576, MAX_TILES, "sampled"),
    choose(128256, 2004, False),
    choose(128256, 2004, True),
]
