"""How hypothesis looks for counterexamples: the same way every time in CI, without a clock anywhere."""

from __future__ import annotations

import os

# Without vector instructions the C++ compiler needs half the time. For the whole process, before anything reads it:
# Inductor keeps what it found out about vectors, and threads do not see settings that others patch.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

from hypothesis import settings

settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
