"""How hypothesis looks for counterexamples: the same way every time in CI, without a clock anywhere."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
