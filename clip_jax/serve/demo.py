"""Web demo: label or caption an image, search embedded images."""

import os
from dataclasses import dataclass
from typing import Any

from clip_jax.errors import InputError, check_ranges
from clip_jax.inference.loading import unit
from clip_jax.inference.predict import check_labels, embed_labels
from clip_jax.inference.search import Method, Searcher, load_for
from clip_jax.inference.stored import Store
from clip_jax.storage.files import AnyPath

SHOWN = 640  # longer side of a search result, in pixels


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Serve the web demo until interrupted."""

    # Run directory, RUN@STEP, RUN@best, model folder, weights in another format, or icons, the
    # bundled model.
    model: AnyPath
    embeddings: AnyPath | None = None  # Folder of `clip-jax embed`; adds the search. None: none.
    # Type of the stored embeddings that a search compares; int8 and binary take less memory. None:
    # as embedded.
    store: Store | None = None
    index: Method = "exact"  # Search method. exact: all embeddings; usearch: approximate.
    host: str = "127.0.0.1"  # Address to serve at; 0.0.0.0 admits other machines.
    port: int = 7860  # Port to serve at.
    # Patches per image of a NaFlex model (sequence length). None: as embedded, or the model's own.
    tokens: int | None = None
    # Number of first channels of embeddings (Matryoshka). None: as embedded, or all.
    dim: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, port="[1, 65535]", tokens="[1, inf)", dim="[1, inf)")


def demo(config: DemoConfig) -> None:
    """Serve the web demo. Raises InputError if Gradio is missing or the port is taken."""
    gr = _gradio()
    page = build(config)
    plain = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            show_error=True,
            footer_links=[],
            theme=plain,
        )
    except OSError as error:
        raise InputError(
            f"cannot serve at {config.host}:{config.port}: the port is taken or the address is not "
            "this machine's; set other ones by --port and --host."
        ) from error
    finally:
        page.close()


def build(config: DemoConfig) -> Any:
    """Return the web demo of a model, a `gradio.Blocks`."""
    gr = _gradio()
    model = load_for(config.embeddings, config.model, tokens=config.tokens, dim=config.dim)
    searcher = None
    if config.embeddings:
        searcher = Searcher(model, config.embeddings, config.store, config.index)

    def label(image: str | None, lines: str, template: str) -> dict[str, float]:
        if not image:
            raise gr.Error("Drop an image first.", print_exception=False)
        labels = [line.strip() for line in lines.splitlines() if line.strip()]
        try:
            labels = check_labels(labels, template)
            features = unit(model.encode_image(model.preprocess([image])))
            shares = model.probabilities(features, embed_labels(model, labels, template))[0]
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return {name: float(share) for name, share in zip(labels, shares, strict=True)}

    def caption(image: str | None) -> str:
        if not image:
            raise gr.Error("Drop an image first.", print_exception=False)
        try:
            return model.caption(model.preprocess([image]))[0]
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def search(text: str, count: float) -> list[tuple[Any, str]]:
        if searcher is None or not text.strip():
            raise gr.Error("Type what to look for.", print_exception=False)
        pictures = []
        for hit in searcher.search(text, int(count)):
            picture = searcher.picture(hit["index"])
            picture.thumbnail((SHOWN, SHOWN))
            pictures.append((picture, f"{hit['similarity']:.3f}  {hit['key']}"))
        return pictures

    length = f", at {model.tokens} tokens" if model.tokens else ""
    # Gradio's temporary folder keeps uploads and results for a day.
    day = 24 * 3600
    with gr.Blocks(title="clip_jax", analytics_enabled=False, delete_cache=(3600, day)) as page:
        gr.Markdown(f"# clip_jax\n{config.model}{length}")
        with gr.Tab("Label an image"), gr.Row():
            with gr.Column():
                # A path, so that the pixels are those of `clip-jax predict`.
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    height=320,
                    sources=["upload", "clipboard"],
                    buttons=[],
                )
                # Any file, so that our reader decides and gives its error message.
                image.preprocess = lambda file: file and file.path
                lines = gr.Textbox(label="Labels, one per line", lines=4)
                template = gr.Textbox(label="Sentence around each", value=model.template)
                button = gr.Button("Label", variant="primary")
            bars = gr.Label(label="Probabilities", num_top_classes=20)
        button.click(label, [image, lines, template], bars, api_name="label")
        if model.config.decoder is not None:
            with gr.Row():
                describe = gr.Button("Describe the image")
                words = gr.Textbox(label="Caption", scale=3)
            describe.click(caption, [image], words, api_name="caption")
        if searcher is not None:
            with gr.Tab("Search"):
                with gr.Row():
                    text = gr.Textbox(label="What to look for", scale=3)
                    count = gr.Slider(4, 48, value=12, step=4, label="Images")
                go = gr.Button("Search", variant="primary")
                gallery = gr.Gallery(label="Closest first", columns=4, height="auto", buttons=[])
            for event in (text.submit, go.click):
                event(search, [text, count], gallery, api_name="search")
    return page


def _gradio() -> Any:
    # Read at import: without it Gradio asks its vendor's server for the newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise InputError("the web demo needs Gradio: pip install 'clip-jax-pods[demo]'") from error
    return gradio
