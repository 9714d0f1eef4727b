"""Draw the README's picture of the RAT layer: docs/layer.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

CHUNKS, LENGTH = 4, 4
QUERY = 13  # the token whose attention is shown
INK, RECURRENT, ATTENTION, PALE = "#1f2933", "#2a7f9e", "#d9722e", "#eef2f5"


def centre(token: int) -> float:
    """The x of a token; chunks stand apart."""
    return token + 0.7 * (token // LENGTH)


def box(ax: plt.Axes, x: float, y: float, text: str, colour: str, strong: bool) -> None:
    """A token or state."""
    face = colour if strong else PALE
    patch = FancyBboxPatch((x - 0.36, y - 0.3), 0.72, 0.6, boxstyle="round,pad=0,rounding_size=0.12")
    patch.set(facecolor=face, edgecolor=colour, linewidth=1.2)
    ax.add_patch(patch)
    ax.text(x, y, text, ha="center", va="center", fontsize=10, color="white" if strong else INK)


def arrow(ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    """An arrow, curved by `bend`."""
    style = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.5, connectionstyle=style
        )
    )


def draw() -> plt.Figure:
    """Inputs below, the recurrence in the middle, one token's attention above."""
    fig, ax = plt.subplots(figsize=(10.5, 4.2))
    for token in range(CHUNKS * LENGTH):
        x, end = centre(token), token % LENGTH == LENGTH - 1
        seen = end and token // LENGTH < QUERY // LENGTH
        box(ax, x, 0, f"$x_{{{token}}}$", INK, False)
        arrow(ax, (x, 0.34), (x, 0.96), "#9aa5b1")
        box(ax, x, 1.3, f"$s_{{{token}}}$", RECURRENT, seen or token == QUERY)
        if not end:
            arrow(ax, (x + 0.37, 1.3), (x + 0.63, 1.3), RECURRENT)
        if seen:
            arrow(ax, (x, 1.64), (centre(QUERY) - 0.2, 3.0), ATTENTION, bend=-0.12)
    x = centre(QUERY)
    arrow(ax, (x, 1.64), (x, 2.95), ATTENTION)
    box(ax, x, 3.3, f"$o_{{{QUERY}}}$", ATTENTION, True)
    for chunk in range(CHUNKS):
        left, right = centre(chunk * LENGTH) - 0.5, centre(chunk * LENGTH + LENGTH - 1) + 0.5
        ax.plot([left, right], [-0.52, -0.52], color=INK, linewidth=1)
        ax.text((left + right) / 2, -0.86, f"chunk {chunk}", ha="center", fontsize=10, color=INK)
    notes = [
        (1.3, RECURRENT, "gated recurrence inside the chunk\n$s_t = g_t\\,s_{t-1} + (1-g_t)\\,v_t$, keys alike"),
        (3.3, ATTENTION, "one softmax over the ends of\nearlier chunks and the token itself"),
    ]
    for y, colour, text in notes:
        ax.text(-7.0, y, text, va="center", fontsize=10.5, color=colour)
    ax.text(-7.0, 0, "tokens, in chunks of L = 4", va="center", fontsize=10.5, color=INK)
    ax.set(xlim=(-7.2, centre(CHUNKS * LENGTH - 1) + 0.8), ylim=(-1.2, 3.9))
    ax.axis("off")
    fig.subplots_adjust(0, 0, 1, 1)
    return fig


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "layer"
    draw().savefig(Path(__file__).with_name("layer.svg"), metadata={"Date": None}, facecolor="white")
