"""Strata, ranks and learning rates that change while a plan trains: rules, the plans that they reach, who applies them.

Public: :class:`~spafit.scheduling.schedule.Schedule` and its rules :class:`~spafit.scheduling.rules.At`,
:class:`~spafit.scheduling.rules.OnPlateau`, :class:`~spafit.scheduling.rules.OnSignal`,
:class:`~spafit.scheduling.rules.OnGradient`, for ``spafit.fit(…, schedule=…)``.
"""

from __future__ import annotations

from spafit.scheduling.rules import At, OnGradient, OnPlateau, OnSignal
from spafit.scheduling.schedule import Schedule

__all__ = ["At", "OnGradient", "OnPlateau", "OnSignal", "Schedule"]
