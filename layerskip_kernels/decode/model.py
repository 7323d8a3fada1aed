from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch

from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.draft_layers import MOST_ROWS, DraftLayers
from layerskip_kernels.models.config import ModelConfig
from layerskip_kernels.models.rope import Rope
from layerskip_kernels.models.weights import ModelWeights
from layerskip_kernels.native import cpu_library
from layerskip_kernels.ops import DecoderLayers, ExitHead, QuantizedWeight, RepetitionPenalty, Sampling, Screen
from layerskip_kernels.reference.decoder_stack import compose

GLUE = {"cuda": "layerskip_kernels.native.cuda.glue"}  # backend -> what it has in place of `decode.glue`


class Model:
    """Weights, config and ops bound to one backend: embedding, a range of layers, head.

    `screen`, `draft_screen`: copies of the LM head read in its place, by what verifies and by drafts; the latter None:
    as what verifies. `draft_layers`: copies of the early layers that draft; None: they draft themselves.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        ops: SimpleNamespace,
        screen: Screen | None = None,
        draft_screen: Screen | None = None,
        draft_layers: DraftLayers | None = None,
    ):
        self.config, self.weights, self.ops = config, weights, ops
        self.screen, self.draft_screen = screen, draft_screen or screen
        self.draft_layers = draft_layers
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.rope = Rope(config.rope, self.device)
        self.glue = import_module(GLUE.get(ops.backends["small_linear"], "layerskip_kernels.decode.glue"))
        self._prefill_ops = None
        if torch_is_faster(ops, self.device, self.dtype):
            self._prefill_ops = SimpleNamespace(**{**vars(ops), "small_linear": torch_linear(ops)})
        self._ranges: dict[tuple[int, int, bool], DecoderLayers] = {}

    def embed(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """tokens [N] int64 -> out [N, C]."""
        self.glue.embed(self.weights.embedding, tokens, out)

    def run_layers(
        self, first: int, last: int, hidden: torch.Tensor, cache: KVCache, *, drafts=False, prefill=False, **where
    ) -> None:
        """Layers [first, last) on hidden [B, T, C], in place. `where`: see `ops.decoder_stack`.

        `drafts`: the copies that draft, where there are some. `prefill`: the products go through torch where it is
        faster with many rows.
        """
        arguments = (hidden, self._layers(first, last, drafts), *cache.layers(first, last))
        constants = dict(
            eps=self.config.rms_norm_eps, scale=self.config.scale, attention_factor=self.rope.attention_factor
        )
        if prefill and self._prefill_ops is not None:
            compose(self._prefill_ops, *arguments, **constants, **where)
        else:
            self.ops.decoder_stack(*arguments, **constants, **where)

    def copies_draft(self, rows: int) -> bool:
        """Whether copies of the early layers draft in rounds of `rows` sequences, and not the layers themselves."""
        return self.draft_layers is not None and rows <= MOST_ROWS

    def prepare_drafts(self, exit_layer: int) -> None:
        """Make the copies of layers [0, exit_layer) that drafts need; raises ValueError for a weight that has none."""
        self._layers(0, exit_layer, drafts=True)

    def head(
        self,
        hidden: torch.Tensor,
        sampling: Sampling | None,
        out: ExitHead,
        logits_out: torch.Tensor | None = None,
        penalty: RepetitionPenalty | None = None,
    ) -> None:
        """Final norm and LM head on hidden [N, C]."""
        self._head(self.screen, hidden, sampling, out, logits_out, penalty)

    def draft_head(
        self,
        hidden: torch.Tensor,
        sampling: Sampling | None,
        out: ExitHead,
        logits_out: torch.Tensor | None = None,
        penalty: RepetitionPenalty | None = None,
    ) -> None:
        """As `head`, with the head that drafts."""
        self._head(self.draft_screen, hidden, sampling, out, logits_out, penalty)

    def _head(self, screen, hidden, sampling, out, logits_out, penalty) -> None:
        self.ops.exit_head(
            hidden,
            self.weights.final_norm,
            self.weights.lm_head,
            eps=self.config.rms_norm_eps,
            penalty=penalty,
            sampling=sampling,
            logits_out=logits_out,
            **({} if screen is None else {"screen": screen}),
            out=out,
        )

    def head_bytes(self, drafts: bool = False) -> int:
        """Of weights that the head reads; of a screen's few rows of the LM head none are counted."""
        screen = self.draft_screen if drafts else self.screen
        return self.weights.lm_head.nbytes if screen is None else screen.nbytes

    def layer_bytes(self, first: int, last: int, drafts: bool = False) -> int:
        """Of weights that layers [first, last) read."""
        return sum(getattr(field, "nbytes", 0) for layer in self._layers(first, last, drafts) for field in layer)

    def draft_share(self, exit_layer: int) -> float:
        """Weights read for a drafted token over those of a whole pass: what it costs where memory limits decoding."""
        draft = self.layer_bytes(0, exit_layer, drafts=True) + self.head_bytes(drafts=True)
        return draft / (self.layer_bytes(0, self.config.num_layers) + self.head_bytes())

    def _layers(self, first: int, last: int, drafts: bool = False) -> DecoderLayers:
        """One object per range, so that what a backend prepares from it is prepared once."""
        key = first, last, drafts and self.draft_layers is not None
        if key not in self._ranges:
            layers = self.draft_layers.first(last) if key[2] else self.weights.layers
            self._ranges[key] = DecoderLayers(layers[first:last])
        return self._ranges[key]


def torch_is_faster(ops: SimpleNamespace, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether prompts go through torch's product: not where ours takes as many rows at once (bfloat16 with AMX), nor
    where torch emulates its half-precision one (x86 before AVX-512)."""
    if device.type != "cpu" or ops.backends["small_linear"] != "cpu":
        return True
    if dtype == torch.bfloat16 and cpu_library()[0].active_variant() == "avx512_amx":
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or supported[dtype]()


def torch_linear(ops: SimpleNamespace):
    """`small_linear` for many rows: torch's product, the same rounding points."""

    def linear(x, weights, *, bias=None, norm=None, residual=None, swiglu=False, out=None):
        if norm is not None:
            x = ops.rms_norm(x, *norm)
        if swiglu:
            return ops.swiglu(*linear(x, weights, bias=bias), out=out)
        if isinstance(weights, torch.Tensor):
            y = torch.nn.functional.linear(x, weights, bias)
            if residual is not None:
                return torch.add(residual, y, out=out)
            return y if out is None else out.copy_(y)
        if isinstance(weights, QuantizedWeight) or isinstance(weights[0], QuantizedWeight):
            return ops.small_linear(x, weights, bias=bias, residual=residual, out=out)
        return [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, bias or [None] * len(weights))]

    return linear
