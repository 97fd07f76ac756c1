"""Figures in the page's colours: drawn once in the light theme's, then inlined with CSS variables in their place."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2330", "#6b7484", "#e2e6ec"
SERIES = ("#2f6bd8", "#d8662a", "#14916a", "#9a48c8", "#c93a55", "#8a7a12")
"""Blue, orange, green, purple, red, olive: apart in luminance too."""
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {c: f"--c{i}" for i, c in enumerate(SERIES)}

HEAT = LinearSegmentedColormap.from_list("heat", [(0.18, 0.42, 0.85, 0.0), (0.18, 0.42, 0.85, 1.0)])
"""Transparent to blue, so that it stands on any background."""

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def style(name: str) -> AbstractContextManager[None]:
    """Draw a figure of this name inside it; ids in its SVG are its own, and the same every time."""
    settings: Any = _STYLE | {"svg.hashsalt": name}
    return matplotlib.rc_context(settings)


def save(figure: Figure, name: str, folder: Path) -> str:
    """Write NAME.svg and NAME.png on white; returns the SVG for `inline`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = io.StringIO()
    with style(name):
        figure.savefig(target, format="svg", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=160, bbox_inches="tight")
    (folder / f"{name}.svg").write_text(target.getvalue(), encoding="utf-8")
    return target.getvalue()


def inline(svg: str, name: str) -> str:
    """An SVG element without background, whose colours are the page's variables."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub("#ffffff", "none", text, flags=re.IGNORECASE)
    for colour, variable in _VARIABLES.items():
        text = re.sub(re.escape(colour), f"var({variable})", text, flags=re.IGNORECASE)
    text = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", text)
    text = re.sub(r"font: ((?:bold |\d+ )?[\d.]+px)[^;\"]*", r"font: \1 var(--sans)", text)
    # Ids of several figures share one page.
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    # The page sets the width, the view box the shape.
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img">{rest}'
