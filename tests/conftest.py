"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# The same examples in every run, so that a change is not refused for what it did not do. New ones:
# HYPOTHESIS_PROFILE=explore, which `make fuzz` sets.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
