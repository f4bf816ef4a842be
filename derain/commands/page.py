"""The page of ``derain app``: what people see and touch; restoring is the service's."""

import base64
import html
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import cv2
import gradio as gr
from fastapi import FastAPI

from derain.commands.guard import QUEUE, Guard
from derain.commands.page_files import KEPT
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
const give = (files) => {
  const input = document.querySelector("#photo input[type=file]");
  if (!input || !files.length) return;
  const given = new DataTransfer();
  given.items.add(files[0]);
  input.files = given.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
};
document.addEventListener("paste", (event) => give(event.clipboardData.files));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  if (event.defaultPrevented) return;
  event.preventDefault();
  give(event.dataTransfer.files);
});
</script>"""
)
"""A photo may be pasted, and dropped anywhere: a browser would otherwise leave the page and open it."""

METADATA = {
    False: "The restored photo has no metadata: no time, camera or location.",
    True: "The restored photo keeps its metadata: time, camera and location, if it has them.",
}


def build(
    service: RestorationService, max_megabytes: int, host: str = "127.0.0.1", allowed: Collection[str] = ()
) -> Guard:
    """Return the page as an application to serve.

    Args:
        service: Restores what people give.
        max_megabytes: Largest file that is taken.
        host: Address that the page is served at.
        allowed: Further host names that the page is opened by.
    """
    models = list(service.restorers)
    with gr.Blocks(title="derain", analytics_enabled=False) as blocks:
        gr.HTML(
            f"<h1>{ICON}derain</h1><p>Takes the rain out of a photo. It stays on this machine, and is deleted after "
            f"{KEPT} minutes. {METADATA[service.keep_metadata]}</p>",
            elem_id="title",
        )
        kept = gr.State()
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
                told = gr.HTML(elem_id="told")
                again = gr.Button("Another photo", elem_id="again", size="md")
                download = gr.DownloadButton("Download PNG", variant="primary", elem_id="download", size="md")
        model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1, elem_id="model")
        with gr.Accordion("No rain in it? Add some", open=False, visible=False, elem_id="rain") as rain:
            amount = gr.Slider(0, 100, 0, step=1, label="Synthetic rain", info="0 adds none, 100 is a downpour.")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="Another one, other streaks.")
        with gr.Accordion("Details", open=False, visible=False, elem_id="details") as details:
            facts = gr.HTML(elem_id="facts")

        shown = [kept, photo, note, result, slider, told, download, rain, details, facts]

        def restore(file: Any, model: Any, amount: Any, seed: Any, request: gr.Request) -> Any:
            """Answer a photo with its restoration, or with what is wrong with it."""
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
                    abandoned=lambda: guard.abandoned(session),
                )
            except DerainError as error:
                refused = {
                    note: gr.update(value=_told(str(error)), visible=True),
                    photo: gr.update(value=None, visible=True),
                }
                return {**refused, kept: None, **{one: gr.update(visible=False) for one in (result, rain, details)}}
            return {
                kept: {"path": str(path), "orig_name": name},
                photo: gr.update(value=None, visible="hidden"),
                note: gr.update(visible=False),
                result: gr.update(visible=True),
                slider: (str(restored.before), str(restored.after)),
                told: _caption(name, restored),
                download: str(restored.download),
                rain: gr.update(visible=True),
                details: gr.update(visible=True),
                facts: _table(restored.facts) + "".join(_figure(*one) for one in restored.maps.items()),
            }

        busy: Any = {"show_progress_on": [photo, slider], "concurrency_id": "restore", "preprocess": False}
        photo.upload(restore, [photo, model, amount, seed], shown, api_name="restore", **busy)
        for control in (model, amount, seed):
            control.change(
                restore,
                [kept, model, amount, seed],
                shown,
                api_visibility="private",
                trigger_mode="always_last",
                **busy,
            )
        away = dict.fromkeys((result, rain, details), gr.update(visible=False))
        again.click(
            lambda: {kept: None, photo: gr.update(visible=True), amount: 0, **away},
            None,
            [kept, photo, amount, *away],
            queue=False,
            api_visibility="private",
        )
    blocks.queue(max_size=QUEUE, api_open=False)
    page: FastAPI = gr.mount_gradio_app(
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
        theme=gr.themes.Base(
            primary_hue="blue",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
            block_info_text_color="*neutral_500",
            block_info_text_color_dark="*neutral_300",
        ),
        head=f"{HEAD}<style>{STYLE.read_text(encoding='utf-8')}</style>",  # whole, which css= would not leave it
    )
    blocks.has_launched = True  # only then does gradio, too, refuse a path that nobody has uploaded
    guard = Guard(page, blocks._queue, service.folder, max_megabytes * 2**20, host, allowed)
    return guard


def _text(value: Any) -> str:
    """Return a text that can be sent back, whatever came."""
    return str(value).encode("utf-8", "replace").decode()


def _number(value: Any, name: str, most: float) -> float:
    """Return a number of the form, nothing as 0.

    Raises:
        DerainError: If it is not one from 0 to ``most``; in words for the page.
    """
    if value is None:
        return 0.0
    if not isinstance(value, int | float) or not 0 <= value <= most:
        raise DerainError(f"{name} is {_text(value)[:20]}. Please give a number from 0 to {most:g}.")
    return float(value)


def _told(message: str) -> str:
    """A message as HTML; what stands between backticks is code."""
    parts = [f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(html.escape(message).split("`"))]
    return f"<p role='alert'>{''.join(parts)}</p>"


def _caption(name: str, restored: RestoredPhoto) -> str:
    told = [restored.facts["size"], restored.facts["time"]]
    if "synthetic rain" in restored.facts:
        told.append("rain added")
    return f"<b>{html.escape(name)}</b>{html.escape(' · '.join(told))}"


def _table(facts: Mapping[str, Any]) -> str:
    """Facts as rows; shares by name, such as the scores of routes, as bars."""
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
    """A small picture, within the page itself: no file of it has to be deleted."""
    data = base64.b64encode(cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()).decode()
    caption = html.escape(name)
    return (
        f"<figure><img src='data:image/jpeg;base64,{data}' alt='{caption}'><figcaption>{caption}</figcaption></figure>"
    )
