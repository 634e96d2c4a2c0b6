"""Hold on to what a model knows while it trains: L2-SP, EWC, KL to the base, replay; each an option of any plan.

Every remedy adds one term to the task's loss. "The start" is the model as it is when :meth:`Remedy.prepare` is called:
before the first step, and in a resumed run before the checkpoint is loaded. To hold on to what an adapter has learnt,
merge it and lay the next plan over the result. Interpolation with the start needs no training.
"""

from spafit.retain.base import PricedRemedy, Remedy, prices
from spafit.retain.interpolation import interpolate, snapshot, sweep
from spafit.retain.options import parse_remedy
from spafit.retain.outputs import KLToBase, Replay
from spafit.retain.weights import EWC, L2SP

__all__ = [
    "EWC",
    "L2SP",
    "KLToBase",
    "PricedRemedy",
    "Remedy",
    "Replay",
    "interpolate",
    "parse_remedy",
    "prices",
    "snapshot",
    "sweep",
]
