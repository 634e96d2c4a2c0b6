"""Where optional real data and models lie; tests that need them skip with the reason when they are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
REFERENCE = ROOT.parent / "shared" / "reference"
MODELS = Path(os.environ.get("SPAFIT_MODELS", Path.home() / ".cache" / "spafit-models"))

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data (../shared/data) is not here")
needs_smollm2 = pytest.mark.skipif(
    not (MODELS / "smollm2").is_dir(), reason="SmolLM2-135M is not in the model folder (SPAFIT_MODELS)"
)
needs_mpnet = pytest.mark.skipif(
    not (MODELS / "mpnet").is_dir(), reason="MPNet-base is not in the model folder (SPAFIT_MODELS)"
)
