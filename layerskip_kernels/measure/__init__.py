"""Measures a checkpoint: what its exits know (`lens`), what rounds cost (`costs`), which (E, K) pays (`settings`)."""
