"""Where other libraries call in: transformers' `generate` and attention interface, lm-evaluation-harness."""
