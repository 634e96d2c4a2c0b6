"""The localization test: does each type of knowledge sit in layers of its own? Supported, refuted, or not known.

"Type k lives in range R_k" needs four conditions. L1: tasks of later types emerge deeper. L2: intervening on R_k harms
type k's tasks more than intervening elsewhere does. L3: every pair of types is doubly dissociated. L4: the order keeps
its sign over seeds, poolings and probes, and a random encoder does not show it. Each is tested where there is evidence
for it, and said to be not tested where there is none.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.block_effects import BlockEffects
from analysis.hypothesis import Hypothesis, default_hypothesis
from analysis.power import plan
from analysis.sentences import range_words
from analysis.stability import Reading, stability
from analysis.verdicts import Condition, TypeVerdict, Verdict, decide, listed
from probing.curves import LayerCurve
from probing.summaries import emergence, expected_layer_robust
from spafit import io
from spafit.errors import DataError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
