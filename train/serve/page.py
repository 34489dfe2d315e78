"""A page in the browser: a picture, questions about it, and answers as they are made.

Gradio (https://www.gradio.app) is an optional extra. The page needs no network: fonts are the
system's, nothing is counted, no version is looked up, and what is uploaded stays on this machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from manifests.errors import UserError
from train.serve.generate import Chatter
from train.serve.prompts import Question, Round, read_image

MAX_UPLOAD = "50mb"
_FONT = ("system-ui", "sans-serif")
_MONO = ("ui-monospace", "monospace")
_CSS = ".gradio-container {max-width: 1060px !important; margin: auto} footer {display: none}"
# How the answers look: plain text, as letters of a model are no markup.
_PLAIN = {"render_markdown": False, "sanitize_html": True, "latex_delimiters": []}
Messages = list[dict[str, Any]]


def build_page(chatter: Chatter, *, title: str = "Warren") -> Any:
    """Return the page, a gr.Blocks. Raises: UserError without Gradio."""
    gradio = _gradio()
    with gradio.Blocks(title=title, analytics_enabled=False, fill_height=True) as page:
        gradio.Markdown(f"## {title}\n{_told(chatter)}")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                picture = _picture(gradio)
                anew = gradio.Button("New conversation", variant="secondary")
            with gradio.Column(scale=3, min_width=360):
                shown = gradio.Chatbot(
                    label="Conversation",
                    height=440,
                    layout="bubble",
                    feedback_options=None,
                    buttons=["copy"],
                    placeholder="Upload a picture and ask about it.",
                    **_PLAIN,
                )
                with gradio.Row(equal_height=True):
                    asked = gradio.Textbox(
                        show_label=False,
                        container=False,
                        placeholder="Your question",
                        scale=5,
                        autofocus=True,
                        max_lines=4,
                    )
                    send = gradio.Button("Ask", variant="primary", scale=1, min_width=80)
                    stop = gradio.Button("Stop", scale=1, min_width=80)
        _connect(gradio, chatter, picture, anew, shown, asked, send, stop)
    return page


def serve(
    chatter: Chatter, host: str = "127.0.0.1", port: int = 7860, *, block: bool = True
) -> Any:
    """Serve the page at http://host:port/ until Ctrl-C and return it.

    host: 127.0.0.1 is seen from this machine only. block: False returns at once; `.close()` ends
    the page. Raises: UserError without Gradio, or when the port is taken.
    """
    page = build_page(chatter)
    gradio = _gradio()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks itself whether it is up
    try:
        page.queue(max_size=32, default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=not block,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=True,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            theme=gradio.themes.Default(font=_FONT, font_mono=_MONO),
            css=_CSS,
        )
    except OSError as error:
        raise UserError(
            f"The page cannot be served at {host}:{port}.", str(error), "Choose another --port."
        ) from error
    return page


def _gradio() -> Any:
    """Return the library, told before it loads to keep to itself."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if find_spec("gradio") is None:
        raise UserError(
            "The page needs Gradio, which is not installed.",
            "It is an optional extra.",
            'Run: pip install "warren[demo]"',
        )
    import gradio

    return gradio


def _told(chatter: Chatter) -> str:
    """Return a line on how answers are made."""
    chosen = chatter.decoding
    how = f"temperature {chosen.temperature:g}" if chosen.temperature else "greedy"
    return f"Answers are {how}, of at most {chosen.max_new_tokens} tokens."


def _picture(gradio: Any) -> Any:
    """Return the upload. image_mode None hands the file itself on: the bits training would see."""
    return gradio.Image(
        label="Picture",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=360,
        buttons=["fullscreen"],
    )


def _connect(
    gradio: Any,
    chatter: Chatter,
    picture: Any,
    anew: Any,
    shown: Any,
    asked: Any,
    send: Any,
    stop: Any,
) -> None:
    """Say what the page does when something is pressed or changed."""

    def answer(path: str | None, text: str, messages: Messages) -> Iterator[tuple[str, Messages]]:
        if not text.strip():
            yield text, messages
            return
        try:
            yield from (("", found) for found in _answered(chatter, path, text, messages))
        except UserError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error

    private = {"api_visibility": "private"}
    started = gradio.on(
        [send.click, asked.submit],
        answer,
        [picture, asked, shown],
        [asked, shown],
        show_progress="hidden",
        **private,
    )
    stop.click(None, None, None, cancels=[started], **private)
    for forget in (anew.click, picture.upload, picture.clear):
        forget(lambda: [], None, [shown], cancels=[started], **private)


def _answered(
    chatter: Chatter, path: str | None, text: str, messages: Messages
) -> Iterator[Messages]:
    """Yield the conversation as its new answer grows."""
    images = () if path is None else (read_image(path),)
    pieces = chatter.stream(Question(text, images, rounds_of(messages)))
    asked = [*messages, {"role": "user", "content": text}]
    yield asked
    answer = ""
    for piece in pieces:
        answer += piece
        yield [*asked, {"role": "assistant", "content": answer}]
    yield [*asked, {"role": "assistant", "content": answer}]


def rounds_of(messages: Messages) -> list[Round]:
    """Return a Gradio conversation as rounds; a question without an answer is left out."""
    said = [(one["role"], _text_of(one["content"])) for one in messages]
    return [
        Round(question, answer)
        for (role, question), (next_role, answer) in zip(said, said[1:], strict=False)
        if (role, next_role) == ("user", "assistant")
    ]


def _text_of(content: Any) -> str:
    """Return a message's text, which Gradio gives back as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(one["text"] for one in content if one["type"] == "text")
