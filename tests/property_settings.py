"""How many examples property tests try: few and always the same ones, unless LAYERSKIP_EXAMPLES asks for more.

`LAYERSKIP_EXAMPLES=5000 pytest tests/test_exactness.py --hypothesis-show-statistics` tries 5000 new ones.
"""

import os

from hypothesis import HealthCheck, settings

ASKED = int(os.environ.get("LAYERSKIP_EXAMPLES", "0"))


def few(examples: int, **more) -> settings:
    """Settings for `examples` derandomized examples, or as many random ones as the environment asks for."""
    return settings(
        max_examples=ASKED or examples,
        derandomize=not ASKED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        **more,
    )
