"""The page of ``derain app``: its layout and events."""

import base64
import html
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import gradio as gr
from fastapi import FastAPI

from derain.commands.guard import MAX_JOBS, Guard
from derain.commands.page_files import KEEP_MINUTES
from derain.commands.service import MAX_PHOTOS, RestorationService, RestoredPhoto, RestoredPhotos
from derain.errors import DerainError
from derain.images import Pixels

STYLE = Path(__file__).with_name("page.css")

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path d="M16 3c5 7 9 11 9 17a9 9 0 0 1-18 0c0-6 \
4-10 9-17z" fill="#3b82f6"/></svg>"""

SCRIPT = Path(__file__).with_name("page.js")
"""Script that accepts photos that are pasted, chosen, or dropped anywhere on the page."""

HEAD = (
    """<link rel="icon" type="image/svg+xml" href="data:image/svg+xml,"""
    + ICON.replace("<", "%3C").replace(">", "%3E").replace("#", "%23").replace('"', "'")
    + """">
<meta name="color-scheme" content="light dark">"""
)
"""Icon and colour scheme in the head of the page."""

UPLOAD_SEVERAL = """async (...values) => {
  const [files, refused] = await uploadChosen();
  return [files, ...values.slice(1, -1), refused];
}"""
"""JavaScript that uploads the chosen photos. The event's first input becomes the uploads, its last one the messages."""

SCALES = ("full", "auto", "2", "3", "4", "6", "8")
"""Values of ``--scale`` of ``derain restore`` that the page offers; the first is the default."""

METADATA = {
    False: "The restored photo has no metadata: no time, camera or location.",
    True: "The restored photo keeps its metadata: time, camera and location, if it has them.",
}
"""Sentence on the page, depending on whether restored photos keep their metadata."""


def build(
    service: RestorationService, max_megabytes: int, host: str = "127.0.0.1", allowed_hosts: Collection[str] = ()
) -> Guard:
    """Build the page with Gradio, behind a `Guard`.

    Args:
        service: Restores uploaded photos.
        max_megabytes: Maximum size of an uploaded file in MiB.
        host: Address that the server listens on.
        allowed_hosts: Additional host names of the page.

    Returns:
        The ASGI application to serve.

    Raises:
        DerainError: If ``host`` or an additional name is not a host name.
    """
    with gr.Blocks(title="derain", analytics_enabled=False) as blocks:
        components = _add_components(service)
        _add_events(components, service, lambda session: guard.abandoned(session))  # guard is assigned below
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
        head=_head(max_megabytes),
    )
    blocks.has_launched = True  # only then does Gradio check the paths of files itself
    guard = Guard(application, blocks._queue, service.folder, max_megabytes * 2**20, host, allowed_hosts)
    return guard


def _head(max_megabytes: int) -> str:
    """Return the head of the page, with styles and script."""
    style, script = (file.read_text(encoding="utf-8") for file in (STYLE, SCRIPT))
    limits = f"const maxMegabytes = {max_megabytes}, maxPhotos = {MAX_PHOTOS};"
    return f"{HEAD}<style>{style}</style><script>{limits}\n{script}</script>"  # css= would rewrite the selectors


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
    photos: gr.File
    refused: gr.JSON
    several: gr.Button
    note: gr.HTML
    result: gr.Column
    slider: gr.ImageSlider
    pairs: gr.Gallery
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
        f"<h1>{ICON}derain</h1><p>Removes rain from photos. Photos are processed on the computer that serves this "
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
        placeholder="# Drop rainy photos here\nor click to choose them, or paste one",
    )
    photos = gr.File(file_count="multiple", visible="hidden")
    refused = gr.JSON(visible="hidden")
    several = gr.Button(visible="hidden", elem_id="several")
    gr.HTML("<p role='status'></p>", elem_id="uploading")
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
        pairs = gr.Gallery(
            show_label=False,
            label="Before and after",
            elem_id="pairs",
            columns=2,
            height=640,
            object_fit="contain",
            interactive=False,
            buttons=["fullscreen"],
            visible=False,
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
        photos,
        refused,
        several,
        note,
        result,
        slider,
        pairs,
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
    """Add the options of `derain restore` that the page offers; return the accordion, scale and strength."""
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
    """Add the events: uploads and changed settings restore photos, and a button clears the page for another photo.

    Args:
        components: Components of the page.
        service: Restores uploaded photos.
        abandoned: Returns whether all jobs of a session are abandoned.
    """
    accordions = (components.rain, components.options, components.details)
    hidden = dict.fromkeys((components.result, *accordions), gr.update(visible=False))

    def restore(
        files: Any,
        model: Any,
        amount: Any,
        seed: Any,
        scale: Any,
        strength: Any,
        request: gr.Request,
        refused: Any = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio finds it by its default
    ) -> Any:
        """Restore one or several photos; return the updates that show results and errors on the page."""
        uploads, messages = _uploads(files)
        messages += [_text(message) for message in refused] if isinstance(refused, list) else []
        if not uploads and not messages:
            return gr.skip()
        session = request.session_hash or ""
        updates: dict[Any, Any] | None = None
        try:
            arguments: dict[str, Any] = {
                "model": _text(model),
                "amount": _number(amount, "Synthetic rain", 100.0),
                "seed": int(_number(seed, "Seed", 2.0**32)),
                "scale": _text(scale)[:20],
                "strength": _number(strength, "Strength", 1.0),
                "abandoned": lambda: abandoned(session),
            }
            if len(uploads) == 1 and not messages:
                ((path, name),) = uploads.items()
                updates = _result_updates(components, name, service.restore(path, name, **arguments))
            elif uploads:
                total = len(uploads)
                progress((0, total), unit="photos")
                arguments["progress"] = lambda done: progress((done, total), unit="photos")
                restored = service.restore_all(uploads, **arguments)
                updates = _results_updates(components, restored, messages + restored.errors)
        except DerainError as error:
            messages.append(str(error))
        except OSError as error:
            reason = error.strerror or type(error).__name__  # without the path
            messages.append(f"The server cannot write the result: {reason}.")
        if updates is None:
            return {
                components.uploaded: None,
                components.note: gr.update(value=_errors(messages), visible=True),
                components.photo: gr.update(value=None, visible=True),
                **hidden,
            }
        kept = [{"path": str(path), "orig_name": name} for path, name in uploads.items()]
        return {components.uploaded: kept, **updates}

    updated = [
        components.uploaded,
        components.photo,
        components.note,
        components.result,
        components.slider,
        components.pairs,
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
    event_options: dict[str, Any] = {
        "show_progress_on": [components.photo, components.slider, components.pairs],
        "concurrency_id": "restore",
        "preprocess": False,
    }
    components.photo.upload(restore, [components.photo, *settings], updated, api_name="restore", **event_options)
    private: dict[str, Any] = {**event_options, "api_visibility": "private", "trigger_mode": "always_last"}
    components.several.click(
        restore, [components.photos, *settings, components.refused], updated, js=UPLOAD_SEVERAL, **private
    )
    for setting in settings:
        setting.change(restore, [components.uploaded, *settings], updated, **private)

    cleared = (components.note, components.result, *accordions)

    def clear() -> dict[Any, Any]:
        hide = dict.fromkeys(cleared, gr.update(visible=False))
        return {components.uploaded: None, components.photo: gr.update(visible=True), components.amount: 0, **hide}

    components.again.click(
        clear,
        None,
        [components.uploaded, components.photo, components.amount, *cleared],
        queue=False,
        api_visibility="private",
    )


def _uploads(files: Any) -> tuple[dict[Path, str], list[str]]:
    """Return the client's name of each uploaded file by path, and a message for each repeated file.

    Gradio gives files of equal name and content the same path.

    Args:
        files: Value of a component or state: a file, a list of files, or None.
    """
    uploads: dict[Path, str] = {}
    messages = []
    for file in files if isinstance(files, list) else [files] if files else []:
        path, name = Path(str(file["path"])), _text(file.get("orig_name") or "photo")
        if path in uploads:
            messages.append(f"{name}: chosen twice, restored once")
        uploads.setdefault(path, name)
    return uploads, messages


def _result_updates(components: _Components, name: str, restored: RestoredPhoto) -> dict[Any, Any]:
    """Return the updates that show a restored photo."""
    figures = [_figure(title, picture) for title, picture in restored.maps.items()]
    facts = [restored.facts["size"], restored.facts["time"]]
    return {
        **_shown(components, name, facts, restored.facts),
        components.note: gr.update(visible=False),
        components.slider: gr.update(value=(str(restored.before), str(restored.after)), visible=True),
        components.pairs: gr.update(value=None, visible=False),
        components.download: gr.update(value=str(restored.download), label="Download PNG"),
        components.facts: _facts_list(restored.facts) + "".join(figures),
    }


def _results_updates(
    components: _Components, restored: RestoredPhotos, messages: Sequence[str]
) -> dict[Any, Any] | None:
    """Return the updates that show several restored photos; None if all failed."""
    if restored.download is None:
        return None
    pictures = []
    for name, before, after in restored.pairs:
        pictures += [(str(before), name), (str(after), "restored")]
    title = f"{len(restored.pairs)} of {len(restored.pairs) + len(messages)} photos"
    return {
        **_shown(components, title, [restored.facts["time"]], restored.facts),
        components.note: gr.update(value=_errors(messages), visible=bool(messages)),
        components.slider: gr.update(value=None, visible=False),
        components.pairs: gr.update(value=pictures, visible=True),
        components.download: gr.update(value=str(restored.download), label="Download ZIP"),
        components.facts: _facts_list(restored.facts),
    }


def _shown(components: _Components, title: str, caption: Sequence[str], facts: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the updates that are the same for one photo and for several.

    Args:
        components: Components of the page.
        title: Name of the photo, or number of photos.
        caption: Facts below the title.
        facts: All facts, by name.
    """
    rain = ["rain added"] if "synthetic rain" in facts else []
    return {
        components.photo: gr.update(value=None, visible="hidden"),
        components.result: gr.update(visible=True),
        components.caption: f"<b>{html.escape(title)}</b>{html.escape(' · '.join([*caption, *rain]))}",
        components.rain: gr.update(visible=True),
        components.options: gr.update(visible=True),
        components.details: gr.update(visible=True),
    }


def _text(value: Any) -> str:
    """Return a value as text; characters that UTF-8 cannot encode are replaced."""
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


def _errors(messages: Sequence[str]) -> str:
    """Return error messages as HTML, one a line; text in backticks becomes code."""
    lines = (re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(message)) for message in messages)
    return f"<p role='alert'>{'<br>'.join(lines)}</p>"


def _facts_list(facts: Mapping[str, Any]) -> str:
    """Return facts as an HTML description list; a mapping, whose values are scores in [0, 1], becomes bars."""
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
    """Return HTML of a small RGB picture with a caption; the picture is embedded, so that no file is written."""
    data = base64.b64encode(cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()).decode()
    caption = html.escape(name)
    return (
        f"<figure><img src='data:image/jpeg;base64,{data}' alt='{caption}'><figcaption>{caption}</figcaption></figure>"
    )
