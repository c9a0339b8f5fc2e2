"""The battery experiment: hundreds of facts, each asked in many ways, through every lens.

`plan(model)` checks and tokenises, `execute(planned)` asks; `Battery.builtin()` is the shipped
battery and `Battery.from_file(path)` a user's own.
"""

from layerscope.experiments.battery.config import PARTS, BatteryConfig
from layerscope.experiments.battery.items import Battery, Item
from layerscope.experiments.battery.run import Plan, execute, plan
from layerscope.experiments.battery.wordings import Wordings

__all__ = ["PARTS", "Battery", "BatteryConfig", "Item", "Plan", "Wordings", "execute", "plan"]
