"""Plots of results, for papers and reports."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from derain.errors import DerainError
from derain.images import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Colours that colour-blind people tell apart (Okabe and Ito, 2008)."""

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 12,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "savefig.dpi": 200,
}


@contextmanager
def _axes(path: Path, title: str, size: tuple[float, float] = (6.4, 4.2)) -> Iterator[Any]:
    """Axes to draw on, written whole or not at all."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DerainError(
            "plots need matplotlib, which is not installed; run: pip install 'derain[notebooks]'"
        ) from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(title=title)
        yield axes
        with write_whole(path) as temporary:
            figure.savefig(temporary, format="png")


def trade_off(path: Path, methods: Mapping[str, tuple[float, float]], dataset: str, protocol: str) -> Path:
    """Draws PSNR over the time an image takes; every method is labelled where it stands.

    Args:
        path: The PNG.
        methods: Name to seconds and dB.
        dataset: What was tested on.
        protocol: How images were judged.
    """
    with _axes(path, f"{dataset}: quality and time") as axes:
        axes.set(xlabel="seconds an image", ylabel=f"PSNR, dB ({protocol})", xscale="log")
        for place, (seconds, psnr) in enumerate(methods.values()):
            marker = "os^D"[place // len(COLOURS) % 4]
            axes.scatter(seconds, psnr, s=60, color=COLOURS[place % len(COLOURS)], marker=marker, zorder=3)
        _plain_log(axes, [seconds for seconds, _ in methods.values()])
        axes.margins(y=0.18)
        _label(axes, list(methods), list(methods.values()))
    return path


def _plain_log(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with a little room and numbers as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xlim(min(values) / 1.8, max(values) * 1.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Writes names beside their points: inwards, and pushed down where they would cover other names or points."""
    from matplotlib.transforms import Bbox, offset_copy

    left, right = axes.get_xlim()
    middle = (left * right) ** 0.5
    axes.figure.canvas.draw()
    pixels = axes.transData.transform(points)
    radius = 5 * axes.figure.dpi / 72
    taken: list[Any] = [Bbox([place - radius, place + radius]) for place in pixels]
    for place in sorted(range(len(names)), key=lambda one: -points[one][1]):
        (x, y), name, colour = points[place], names[place], COLOURS[place % len(COLOURS)]
        side = 1 if x <= middle else -1
        drop = 0.0
        while True:
            where = offset_copy(axes.transData, axes.figure, 8 * side, drop, units="points")
            align = "left" if side > 0 else "right"
            text = axes.text(x, y, name, transform=where, ha=align, va="center", fontsize=9, color=colour)
            box = text.get_window_extent()
            if drop < -120 or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
            drop -= 4


def curves(path: Path, runs: Mapping[str, Sequence[tuple[float, float]]]) -> Path:
    """Draws how validation went; every curve is labelled at its end.

    Args:
        path: The PNG.
        runs: Name to epochs and dB.
    """
    with _axes(path, "Validation, epoch by epoch", (7.2, 4.2)) as axes:
        from matplotlib.ticker import MaxNLocator

        axes.set(xlabel="epoch", ylabel="val/psnr, dB")
        ends = {}
        for place, (name, points) in enumerate(runs.items()):
            colour = COLOURS[place % len(COLOURS)]
            xs, ys = zip(*points, strict=True)
            style = ("-", "--", ":")[place // len(COLOURS) % 3]
            axes.plot(xs, ys, style, color=colour, lw=1.8, marker="o" if len(points) < 25 else "", ms=3.5)
            ends[name] = (xs[-1], ys[-1], colour)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _at_ends(axes, ends)
    return path


def _at_ends(axes: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Writes names right of the axes, each as near its curve's end as the others allow, joined by a thin line."""
    low, high = axes.get_ylim()
    step = (high - low) / 20
    order = sorted(ends, key=lambda name: ends[name][1])
    heights: list[float] = []
    for name in order:
        heights.append(max(ends[name][1], heights[-1] + step if heights else low))
    surplus = max(0.0, heights[-1] - high) if heights else 0.0
    for place in reversed(range(len(heights))):  # pushed down again where they passed the top
        ceiling = heights[-1] - surplus if place == len(heights) - 1 else heights[place + 1] - step
        heights[place] = min(heights[place], ceiling)
    for name, height in zip(order, heights, strict=True):
        x, y, colour = ends[name]
        axes.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def images(path: Path, pairs: Sequence[tuple[float, float]], method: str, dataset: str, protocol: str) -> Path:
    """Draws every image's PSNR before and after; above the diagonal it became better.

    Args:
        path: The PNG.
        pairs: Rainy and derained, in dB.
        method: Who derained.
        dataset: What was tested on.
        protocol: How images were judged.
    """
    better = sum(after > before for before, after in pairs)
    gain = sum(after - before for before, after in pairs) / len(pairs)
    with _axes(path, f"{method} on {dataset}", (5.2, 5.2)) as axes:
        axes.set(xlabel=f"rainy, PSNR in dB ({protocol})", ylabel=f"derained, PSNR in dB ({protocol})", aspect="equal")
        low = min(min(pair) for pair in pairs) - 1
        high = max(max(pair) for pair in pairs) + 1
        axes.plot([low, high], [low, high], color="#888888", lw=1, zorder=1)
        axes.text(
            high,
            high,
            "unchanged  ",
            rotation=45,
            rotation_mode="anchor",
            ha="right",
            va="top",
            color="#777777",
            size=9,
        )
        colours = [COLOURS[0] if after > before else COLOURS[1] for before, after in pairs]
        xs, ys = zip(*pairs, strict=True)
        axes.scatter(xs, ys, s=22, c=colours, alpha=0.65, linewidths=0, zorder=3)
        axes.set(xlim=(low, high), ylim=(low, high))
        told = f"{better} of {len(pairs)} images better\n{gain:+.2f} dB on average"
        axes.text(0.03, 0.97, told, transform=axes.transAxes, va="top", color="#222222", size=9.5, linespacing=1.4)
    return path
