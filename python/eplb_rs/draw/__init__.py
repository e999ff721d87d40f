"""Pictures of a plan: how much each rank carries in each layer, before and after.

Drawn with Matplotlib (``pip install 'eplb-rs[plot]'``), on figures of its own: no display is
needed, and none of Matplotlib's global state is read or changed.
"""

from eplb_rs.draw.look import DARK, LIGHT, Palette, calm
from eplb_rs.draw.matplotlib_files import check_matplotlib
from eplb_rs.draw.plan_files import check_path, save
from eplb_rs.draw.plan_page import page
from eplb_rs.draw.plan_picture import figure, heat_map

__all__ = [
    "DARK",
    "LIGHT",
    "Palette",
    "calm",
    "check_matplotlib",
    "check_path",
    "figure",
    "heat_map",
    "page",
    "save",
]
