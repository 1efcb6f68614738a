"""Train fast-weight language models with ReFINE, score them with lm-eval, publish what was measured.

Importing this package is cheap and imports no torch. It makes transformers' auto classes know our models and
lm-eval know our backends, whichever is imported first (see `refine_harness.registration`).
"""

__version__ = "0.1.0"

from refine_harness.registration import install

install()

__all__ = ["__version__"]
