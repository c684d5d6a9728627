"""A page in the browser: label an image with words of your own, search an embedded folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.load import load
from clip_jax.predict import Searcher, check_labels, embed_labels, probabilities, unit

SHOWN = 640  # pixels of the longer side of a picture that was found


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Serve the page until interrupted."""

    model: Path  # a run's work directory, a model folder, or a foreign file
    embeddings: Path | None = None  # folder that `clip-jax embed` wrote: adds the search
    host: str = "127.0.0.1"  # address to serve at; 0.0.0.0 lets other machines in
    port: int = 7860

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be from 1 to 65535.")


def demo(config: DemoConfig) -> None:
    """Serve the page until interrupted. ValueError if Gradio is missing or the port is taken."""
    gr = _gradio()
    page = build(config)
    plain = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name=config.host, server_port=config.port, share=False, inbrowser=False,
            ssr_mode=False, show_error=True, footer_links=[], theme=plain,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(
            f"cannot serve at {config.host}:{config.port}: the port is taken or the address is not "
            "this machine's; choose others by --port and --host."
        ) from error
    finally:
        page.close()


def build(config: DemoConfig) -> Any:
    """Lay out the page, a `gradio.Blocks`, around a loaded model."""
    gr = _gradio()
    model = load(config.model)
    searcher = Searcher(model, config.embeddings) if config.embeddings else None

    def label(image: str | None, lines: str, template: str) -> dict[str, float]:
        if not image:
            raise gr.Error("Drop an image first.", print_exception=False)
        labels = [line.strip() for line in lines.splitlines() if line.strip()]
        try:
            check_labels(labels, template)
            features = unit(model.encode_image(model.preprocess([image])))
            found = probabilities(model, features, embed_labels(model, labels, template))[0]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return {name: float(share) for name, share in zip(labels, found, strict=True)}

    def search(text: str, count: float) -> list[tuple[Any, str]]:
        if searcher is None or not text.strip():
            raise gr.Error("Type what to look for.", print_exception=False)
        pictures = []
        for found in searcher.search(text, int(count)):
            picture = searcher.picture(found["index"])
            picture.thumbnail((SHOWN, SHOWN))
            pictures.append((picture, f"{found['similarity']:.3f}  {found['key']}"))
        return pictures

    # A day's uploads and results lie in Gradio's temporary folder, no longer.
    day = 24 * 3600
    with gr.Blocks(title="clip_jax", analytics_enabled=False, delete_cache=(3600, day)) as page:
        gr.Markdown(f"# clip_jax\n{config.model}")
        with gr.Tab("Label an image"), gr.Row():
            with gr.Column():
                # A path, so that the pixels are what `clip-jax predict` sees.
                image = gr.Image(label="Image", type="filepath", image_mode=None, height=320,
                                 sources=["upload", "clipboard"], buttons=[])  # fmt: skip
                # What the file holds is ours to read, or to refuse in one sentence.
                image.preprocess = lambda file: file and file.path
                lines = gr.Textbox(label="Labels, one a line", lines=4)
                template = gr.Textbox(label="Sentence around each", value="a photo of a {}.")
                button = gr.Button("Label", variant="primary")
            bars = gr.Label(label="Probabilities", num_top_classes=20)
        button.click(label, [image, lines, template], bars, api_name="label")
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
    # Read at import: without it Gradio asks its maker's server for the newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the page needs Gradio: pip install 'clip-jax-pods[demo]'") from error
    return gradio
