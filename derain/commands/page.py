"""The page of ``derain app``: its layout and events."""

import base64
import html
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import gradio as gr
from fastapi import FastAPI

from derain.commands.guard import MAX_JOBS, Guard
from derain.commands.page_files import KEEP_MINUTES
from derain.commands.service import RestorationService, RestoredPhoto
from derain.errors import DerainError
from derain.images import Pixels

STYLE = Path(__file__).with_name("page.css")

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path d="M16 3c5 7 9 11 9 17a9 9 0 0 1-18 0c0-6 \
4-10 9-17z" fill="#3b82f6"/></svg>"""

HEAD = (
    """<link rel="icon" type="image/svg+xml" href="data:image/svg+xml,"""
    + ICON.replace("<", "%3C").replace(">", "%3E").replace("#", "%23").replace('"', "'")
    + """">
<meta name="color-scheme" content="light dark">
<script>
const upload = (files) => {
  const input = document.querySelector("#photo input[type=file]");
  if (!input || !files.length) return;
  const transfer = new DataTransfer();
  transfer.items.add(files[0]);
  input.files = transfer.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
};
document.addEventListener("paste", (event) => upload(event.clipboardData.files));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  if (event.defaultPrevented) return;
  event.preventDefault();
  upload(event.dataTransfer.files);
});
</script>"""
)
"""Head of the page: its icon, and a script that accepts photos pasted or dropped anywhere on it.

Without the script, a browser would leave the page and open a dropped photo.
"""

SCALES = ("full", "auto", "2", "3", "4", "6", "8")
"""Values of the option ``scale``, as for ``derain restore``; the first is the default."""

METADATA = {
    False: "The restored photo has no metadata: no time, camera or location.",
    True: "The restored photo keeps its metadata: time, camera and location, if it has them.",
}
"""Sentence on the page by whether metadata is kept."""


def build(
    service: RestorationService, max_megabytes: int, host: str = "127.0.0.1", allowed_hosts: Collection[str] = ()
) -> Guard:
    """Build the page with Gradio, behind a `Guard` that enforces hosts, origins, sizes and queue limits.

    Args:
        service: Restores uploaded photos.
        max_megabytes: Maximum size of an uploaded file in MiB.
        host: Address of the server.
        allowed_hosts: Additional host names of the page.

    Returns:
        The ASGI application to serve.

    Raises:
        DerainError: If ``host`` or an additional name is not a host name.
    """
    with gr.Blocks(title="derain", analytics_enabled=False) as blocks:
        components = _add_components(service)
        _add_events(components, service, lambda session: guard.abandoned(session))  # late binding: guard is made below
    blocks.queue(max_size=MAX_JOBS, api_open=False)
    application: FastAPI = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=f"{max_megabytes}mb",
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=_theme(),
        head=f"{HEAD}<style>{STYLE.read_text(encoding='utf-8')}</style>",  # css= would rewrite the selectors
    )
    blocks.has_launched = True  # makes Gradio, too, refuse paths that were not uploaded
    guard = Guard(application, blocks._queue, service.folder, max_megabytes * 2**20, host, allowed_hosts)
    return guard


def _theme() -> gr.themes.Base:
    theme = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_300",
    )


class _Components(NamedTuple):
    """Components of the page that events read or update."""

    uploaded: gr.State
    photo: gr.Image
    note: gr.HTML
    result: gr.Column
    slider: gr.ImageSlider
    caption: gr.HTML
    again: gr.Button
    download: gr.DownloadButton
    model: gr.Dropdown
    rain: gr.Accordion
    amount: gr.Slider
    seed: gr.Number
    options: gr.Accordion
    scale: gr.Dropdown
    strength: gr.Slider
    details: gr.Accordion
    facts: gr.HTML


def _add_components(service: RestorationService) -> _Components:
    """Add the components to the page, from top to bottom."""
    models = list(service.restorers)
    gr.HTML(
        f"<h1>{ICON}derain</h1><p>Removes rain from a photo. Photos are processed on the computer that serves this "
        f"page and deleted after {KEEP_MINUTES} minutes. {METADATA[service.keep_metadata]}</p>",
        elem_id="title",
    )
    uploaded = gr.State()
    photo = gr.Image(
        type="filepath",
        sources=["upload"],
        show_label=False,
        label="Rainy photo",
        height=420,
        elem_id="photo",
        buttons=[],
        placeholder="# Drop a rainy photo here\nor click to choose one, or paste it",
    )
    note = gr.HTML(elem_id="note", visible=False)
    with gr.Column(visible=False, elem_id="result") as result:
        slider = gr.ImageSlider(
            type="filepath",
            show_label=False,
            label="Before and after",
            elem_id="slider",
            buttons=["fullscreen"],
            max_height=560,
        )
        with gr.Row(elem_id="actions"):
            caption = gr.HTML(elem_id="caption")
            again = gr.Button("Another photo", elem_id="again", size="md")
            download = gr.DownloadButton("Download PNG", variant="primary", elem_id="download", size="md")
    model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1, elem_id="model")
    with gr.Accordion(
        "Try it with a clean photo: add synthetic rain", open=False, visible=False, elem_id="rain"
    ) as rain:
        amount = gr.Slider(0, 100, 0, step=1, label="Synthetic rain", info="0 adds none, 100 is a downpour.")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="Changes the streaks and their direction.")
    options, scale, strength = _add_options()
    with gr.Accordion("Details", open=False, visible=False, elem_id="details") as details:
        facts = gr.HTML(elem_id="facts")
    return _Components(
        uploaded,
        photo,
        note,
        result,
        slider,
        caption,
        again,
        download,
        model,
        rain,
        amount,
        seed,
        options,
        scale,
        strength,
        details,
        facts,
    )


def _add_options() -> tuple[gr.Accordion, gr.Dropdown, gr.Slider]:
    """Add the options of derain restore that the page has: the accordion, scale and strength."""
    with gr.Accordion("Options", open=False, visible=False, elem_id="options") as options:
        scale = gr.Dropdown(
            list(SCALES),
            value=SCALES[0],
            label="Scale",
            info="Estimate the rain on a reduced photo, for wide streaks on large photos; auto decides by the size.",
        )
        strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", info="Share of the rain that is removed.")
    return options, scale, strength


def _add_events(components: _Components, service: RestorationService, abandoned: Callable[[str], bool]) -> None:
    """Restore a photo when it is uploaded or a setting changes; clear the page for another photo.

    Args:
        components: Components of the page.
        service: Restores uploaded photos.
        abandoned: Returns whether all jobs of a session are abandoned.
    """
    accordions = (components.rain, components.options, components.details)
    hidden = dict.fromkeys((components.result, *accordions), gr.update(visible=False))

    def restore(file: Any, model: Any, amount: Any, seed: Any, scale: Any, strength: Any, request: gr.Request) -> Any:
        """Restore a photo; return the updates of the page, which show the result or the error."""
        if not file:
            return gr.skip()
        path, name = Path(str(file.get("path"))), _text(file.get("orig_name") or "photo")
        session = request.session_hash or ""
        try:
            restored = service.restore(
                path,
                name,
                _text(model),
                _number(amount, "Synthetic rain", 100),
                int(_number(seed, "Seed", 2**32)),
                _text(scale)[:20],
                _number(strength, "Strength", 1),
                abandoned=lambda: abandoned(session),
            )
        except DerainError as error:
            return {
                components.uploaded: None,
                components.note: gr.update(value=_error(str(error)), visible=True),
                components.photo: gr.update(value=None, visible=True),
                **hidden,
            }
        return {
            components.uploaded: {"path": str(path), "orig_name": name},
            **_result_updates(components, name, restored),
        }

    updated = [
        components.uploaded,
        components.photo,
        components.note,
        components.result,
        components.slider,
        components.caption,
        components.download,
        *accordions,
        components.facts,
    ]
    settings: list[Any] = [
        components.model,
        components.amount,
        components.seed,
        components.scale,
        components.strength,
    ]
    options: dict[str, Any] = {
        "show_progress_on": [components.photo, components.slider],
        "concurrency_id": "restore",
        "preprocess": False,
    }
    components.photo.upload(restore, [components.photo, *settings], updated, api_name="restore", **options)
    for setting in settings:
        setting.change(
            restore,
            [components.uploaded, *settings],
            updated,
            api_visibility="private",
            trigger_mode="always_last",
            **options,
        )

    def clear() -> dict[Any, Any]:
        return {components.uploaded: None, components.photo: gr.update(visible=True), components.amount: 0, **hidden}

    components.again.click(
        clear,
        None,
        [components.uploaded, components.photo, components.amount, *hidden],
        queue=False,
        api_visibility="private",
    )


def _result_updates(components: _Components, name: str, restored: RestoredPhoto) -> dict[Any, Any]:
    """Return the updates that show a restored photo."""
    figures = [_figure(title, picture) for title, picture in restored.maps.items()]
    return {
        components.photo: gr.update(value=None, visible="hidden"),
        components.note: gr.update(visible=False),
        components.result: gr.update(visible=True),
        components.slider: (str(restored.before), str(restored.after)),
        components.caption: _caption(name, restored),
        components.download: str(restored.download),
        components.rain: gr.update(visible=True),
        components.options: gr.update(visible=True),
        components.details: gr.update(visible=True),
        components.facts: _facts_list(restored.facts) + "".join(figures),
    }


def _text(value: Any) -> str:
    """Return a value as text that UTF-8 can encode."""
    return str(value).encode("utf-8", "replace").decode()


def _number(value: Any, name: str, maximum: float) -> float:
    """Return the value of a number field; 0 if it is empty.

    Raises:
        DerainError: If the value is not a number from 0 to ``maximum``; the message is shown on the page.
    """
    if value is None:
        return 0.0
    if not isinstance(value, int | float) or not 0 <= value <= maximum:
        raise DerainError(f"{name} is {_text(value)[:20]}. Please give a number from 0 to {maximum:g}.")
    return float(value)


def _error(message: str) -> str:
    """Return an error message as HTML; text in backticks becomes code."""
    text = re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(message))
    return f"<p role='alert'>{text}</p>"


def _caption(name: str, restored: RestoredPhoto) -> str:
    facts = [restored.facts["size"], restored.facts["time"]]
    if "synthetic rain" in restored.facts:
        facts.append("rain added")
    return f"<b>{html.escape(name)}</b>{html.escape(' · '.join(facts))}"


def _facts_list(facts: Mapping[str, Any]) -> str:
    """Return facts as an HTML description list; a mapping of scores becomes a list of bars."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            bars = (
                f"<li><span>{html.escape(str(key))}</span><meter min='0' max='1' value='{share:.4f}'></meter>"
                f"<b>{share:.3f}</b></li>"
                for key, share in value.items()
            )
            rows.append(f"<dt>{html.escape(name)}</dt><dd><ul>{''.join(bars)}</ul></dd>")
        else:
            rows.append(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _figure(name: str, picture: Pixels) -> str:
    """Return a small RGB picture as HTML; it is embedded, so that no file has to be deleted."""
    data = base64.b64encode(cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()).decode()
    caption = html.escape(name)
    return (
        f"<figure><img src='data:image/jpeg;base64,{data}' alt='{caption}'><figcaption>{caption}</figcaption></figure>"
    )
