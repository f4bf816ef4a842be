"""Plots of results for papers and reports."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from derain.errors import DerainError
from derain.images import write_whole

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Colours that colour-blind people can distinguish: six of Okabe and Ito (2008), and grey."""

MARKERS = "os^D"
LINE_STYLES = ("-", "--", ":")

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

MAX_LABEL_OFFSET = 120
"""Largest distance by which a label is moved down, in typographic points (1/72 inch)."""


@contextmanager
def _axes(path: Path, title: str, size: tuple[float, float] = (6.4, 4.2)) -> Iterator[Any]:
    """Yield axes to draw on; when the block succeeds, write the figure as PNG. ``size`` is in inches."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "plots need matplotlib, which is not installed; run: pip install 'derain[notebooks]'"
        raise DerainError(message) from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(title=title)
        yield axes
        with write_whole(path) as temporary:
            figure.savefig(temporary, format="png")


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def trade_off(path: Path, methods: Mapping[str, tuple[float, float]], dataset: str, protocol: str) -> Path:
    """Plot PSNR against seconds per image: one labelled point per method.

    Args:
        path: PNG file to write.
        methods: Seconds per image and PSNR in dB, by name of the method.
        dataset: Name of the test set.
        protocol: Protocol of the PSNR.

    Returns:
        The path.

    Raises:
        DerainError: If matplotlib is not installed.
    """
    with _axes(path, f"{dataset}: quality and time") as axes:
        axes.set(xlabel="seconds per image", ylabel=f"PSNR, dB ({protocol})", xscale="log")
        for index, (seconds, psnr) in enumerate(methods.values()):
            marker = MARKERS[index // len(COLORS) % len(MARKERS)]
            axes.scatter(seconds, psnr, s=60, color=_color(index), marker=marker, zorder=3)
        _set_log_axis(axes, [seconds for seconds, _ in methods.values()])
        axes.margins(y=0.18)
        _label_points(axes, list(methods), list(methods.values()))
    return path


def _set_log_axis(axes: Any, values: Sequence[float]) -> None:
    """Set the limits of a logarithmic x axis, and label it with plain numbers instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xlim(min(values) / 1.8, max(values) * 1.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label_points(axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write names beside their points, towards the middle; move a name down if it covers another name or a point."""
    from matplotlib.transforms import Bbox

    left, right = axes.get_xlim()
    middle = (left * right) ** 0.5  # the axis is logarithmic
    axes.figure.canvas.draw()
    centres = axes.transData.transform(points)
    radius = 5 * axes.figure.dpi / 72
    occupied = [Bbox([centre - radius, centre + radius]) for centre in centres]
    from_top = sorted(range(len(names)), key=lambda index: -points[index][1])
    for index in from_top:
        x, _ = points[index]
        side = 1 if x <= middle else -1
        box = _label_point(axes, names[index], points[index], side, _color(index), occupied)
        occupied.append(box)


def _label_point(
    axes: Any, name: str, point: tuple[float, float], side: int, color: str, occupied: Sequence[Any]
) -> Any:
    """Write a label at the highest free position beside a point, or at the lowest if none is free.

    Args:
        axes: Axes to write on.
        name: Text of the label.
        point: The point in data coordinates.
        side: 1 for a label right of the point, -1 for left.
        color: Colour of the text.
        occupied: Boxes that the label should not cover, in pixels.

    Returns:
        The box of the label in pixels.
    """
    from matplotlib.transforms import offset_copy

    for drop in range(0, MAX_LABEL_OFFSET + 1, 4):
        transform = offset_copy(axes.transData, axes.figure, 8 * side, -drop, units="points")
        alignment = "left" if side > 0 else "right"
        text = axes.text(*point, name, transform=transform, ha=alignment, va="center", fontsize=9, color=color)
        box = text.get_window_extent()
        if not any(box.overlaps(other_box) for other_box in occupied):
            return box
        if drop < MAX_LABEL_OFFSET:
            text.remove()
    return box


def curves(path: Path, runs: Mapping[str, Sequence[tuple[float, float]]]) -> Path:
    """Plot validation PSNR against epochs: one curve per run, with a label at its end.

    Args:
        path: PNG file to write.
        runs: Pairs of epoch and PSNR in dB, by name of the run.

    Returns:
        The path.

    Raises:
        DerainError: If matplotlib is not installed.
    """
    with _axes(path, "Validation by epoch", (7.2, 4.2)) as axes:
        from matplotlib.ticker import MaxNLocator

        axes.set(xlabel="epoch", ylabel="val/psnr, dB")
        ends = {}
        for index, (name, points) in enumerate(runs.items()):
            epochs, psnrs = zip(*points, strict=True)
            style = LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]
            marker = "o" if len(points) < 25 else ""
            axes.plot(epochs, psnrs, style, color=_color(index), lw=1.8, marker=marker, ms=3.5)
            ends[name] = (epochs[-1], psnrs[-1], _color(index))
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_ends(axes, ends)
    return path


def _label_ends(axes: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write the names of curves right of the axes, near the ends of the curves, connected to them by thin lines.

    Args:
        axes: Axes to write on.
        ends: Last epoch, last PSNR and colour of each curve, by name.
    """
    low, high = axes.get_ylim()
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = _spread([ends[name][1] for name in names], low, high, (high - low) / 20)
    line = {"arrowstyle": "-", "lw": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
    for name, height in zip(names, heights, strict=True):
        x, y, color = ends[name]
        axes.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=color,
            annotation_clip=False,
            arrowprops={**line, "color": color},
        )


def _spread(heights: Sequence[float], low: float, high: float, distance: float) -> list[float]:
    """Return ascending heights of labels, moved apart until neighbours have a minimum distance.

    Labels move up; those above ``high`` move down again.

    Example:
        >>> _spread([1.0, 1.0, 5.0], 0.0, 5.0, 1.0), _spread([4.5, 5.0], 0.0, 5.0, 1.0)
        ([1.0, 2.0, 5.0], [4.0, 5.0])
    """
    spread: list[float] = []
    for height in heights:
        spread.append(max(height, spread[-1] + distance if spread else low))
    ceiling = high
    for index in reversed(range(len(spread))):
        spread[index] = min(spread[index], ceiling)
        ceiling = spread[index] - distance
    return spread


def before_and_after(
    path: Path, pairs: Sequence[tuple[float, float]], method: str, dataset: str, protocol: str
) -> Path:
    """Plot the PSNR of each image after restoration against its PSNR before; images above the diagonal improved.

    Args:
        path: PNG file to write.
        pairs: PSNR of the rainy and of the derained image in dB, for each image.
        method: Name of the method.
        dataset: Name of the test set.
        protocol: Protocol of the PSNR.

    Returns:
        The path.

    Raises:
        DerainError: If matplotlib is not installed.
    """
    gains = [after - before for before, after in pairs]
    improved = sum(gain > 0 for gain in gains)
    mean_gain = sum(gains) / len(gains)
    low = min(min(pair) for pair in pairs) - 1
    high = max(max(pair) for pair in pairs) + 1
    with _axes(path, f"{method} on {dataset}", (5.2, 5.2)) as axes:
        axes.set(xlabel=f"rainy, PSNR in dB ({protocol})", ylabel=f"derained, PSNR in dB ({protocol})", aspect="equal")
        axes.plot([low, high], [low, high], color="#888888", lw=1, zorder=1)
        diagonal_label = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "top"}
        axes.text(high, high, "unchanged  ", color="#777777", size=9, **diagonal_label)
        befores, afters = zip(*pairs, strict=True)
        colors = [COLORS[0] if gain > 0 else COLORS[1] for gain in gains]
        axes.scatter(befores, afters, s=22, c=colors, alpha=0.65, linewidths=0, zorder=3)
        axes.set(xlim=(low, high), ylim=(low, high))
        summary = f"{improved} of {len(pairs)} images improved\n{mean_gain:+.2f} dB on average"
        axes.text(0.03, 0.97, summary, transform=axes.transAxes, va="top", color="#222222", size=9.5, linespacing=1.4)
    return path
