"""Export of a checkpoint by optimum-intel, for `cpu_peers.py`. It may run in a Python of its own: optimum-intel 2.2
needs transformers < 5.6.

    python benchmarks/openvino_export.py CHECKPOINT OUTPUT bf16|int8
"""

import sys

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def export(checkpoint: str, output: str, weights: str) -> None:
    quantization = OVWeightQuantizationConfig(bits=8, sym=False) if weights == "int8" else None
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=False, quantization_config=quantization
    )
    model.save_pretrained(output)


if __name__ == "__main__":
    export(*sys.argv[1:])
