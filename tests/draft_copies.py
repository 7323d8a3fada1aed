"""What tests of the copies that draft, of early layers and of the LM head, have in common."""

import torch

import layerskip_kernels as lk
from layerskip_kernels import registry

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14]
NEW = 24
BACKENDS = [
    name
    for name in ("reference", "cpu")
    if all(
        registry.why_not(name, op, torch.device("cpu"), torch.float32, quantized=True) is None
        for op in ("small_linear", "exit_head")
    )
]


def assert_answers_stay(model, backend: str, part: str, sampled: bool) -> None:
    """Whatever copy of `part` drafts ("draft_layers", "draft_head"), what is said is what the model's own says."""

    def decoder_of(copy, **options):
        return lk.SelfSpeculativeDecoder.from_model(model, backend=backend, max_batch_size=2, **{part: copy}, **options)

    options = dict(max_new_tokens=NEW, eos_token_id=[], output_logits=True)
    if sampled:
        options |= dict(sample=True, temperature=0.8, seed=[1, 2, 3])
    own = decoder_of("shared")
    expected = {s: own.generate(PROMPTS, generation_strategy=s, **options) for s in ("autoregressive", "early_exit")}
    for copy in ("int8", "int4"):
        decoder = decoder_of(copy, exit_layer=1)
        assert getattr(decoder, part) == copy
        assert decoder.model.draft_layers if part == "draft_layers" else decoder.model.draft_screen
        for strategy, exit_layer, drafts, more in (
            ("autoregressive", 1, 0, {}),
            ("early_exit", 1, 0, {}),
            ("self_speculative", 1, 2, {}),
            ("self_speculative", 2, 4, dict(draft_confidence=0.2, adaptive_speculations=True)),
            ("self_speculative", 3, 5, {}),
        ):
            how = dict(generation_strategy=strategy, exit_layer=exit_layer, num_speculations=drafts, **more)
            result = decoder.generate(PROMPTS, **options, **how)
            same = expected["early_exit" if strategy == "early_exit" else "autoregressive"]
            assert result.sequences == same.sequences, (copy, how)
            if backend != "reference":  # whose bits depend on how many rows there are
                assert all(map(torch.equal, result.logits, same.logits)), (copy, how)
        assert result.stats.accepted > 0
