"""Commands that let a trained model answer: in a terminal, and on a page."""

from __future__ import annotations

import sys
from typing import Any

import click

_model = click.argument("model", metavar="MODEL")
_adapter = click.option(
    "--adapter", metavar="DIR", help="A peft adapter, and the projector beside it."
)


@click.command()
@_model
@click.option("--image", metavar="FILE", help="What the first questions are about.")
@_adapter
@click.option("--max-tokens", default=512, show_default=True, help="Longest answer.")
@click.option("--template", default="chat", show_default=True, help="plain: captions, stage 1.")
def chat(
    model: str, image: str | None, adapter: str | None, max_tokens: int, template: str
) -> None:
    """Answer questions about a picture, one a line: typed, or from a pipe.

    /image FILE shows another picture, /reset starts anew, /quit ends.

    Example: warren chat runs/mine/model --image cat.jpg
    """
    from train.serve.chat import COMMANDS as WORDS
    from train.serve.chat import chat as talk

    chatter = _load(model, adapter, template, max_tokens)
    typed = sys.stdin.isatty()
    if typed:
        click.echo(f"Ask, or: {WORDS}; Ctrl-C stops an answer", err=True)
    talk(chatter, image, _say, _typed_line if typed else _piped_line, _notice)


@click.command()
@_model
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: for everyone.")
@click.option("--port", default=7860, show_default=True)
@_adapter
@click.option("--template", default="chat", show_default=True, help="plain: captions, stage 1.")
def serve(model: str, host: str, port: int, adapter: str | None, template: str) -> None:
    """Serve a page in the browser: a picture, questions and answers.

    Example: warren serve runs/mine/model --port 7860
    """
    from train.serve.page import serve as run

    chatter = _load(model, adapter, template)
    _notice(f"http://{host}:{port}/ - Ctrl-C ends it")
    run(chatter, host, port)


def _load(model: str, adapter: str | None, template: str, max_tokens: int = 512) -> Any:
    from pipelines.training.launch import ready_for_models

    ready_for_models()
    from train.models.hub import local_directory
    from train.serve.generate import Decoding, load_model

    model = local_directory(model)
    decoding = Decoding.load({"max_new_tokens": max_tokens}, where="--max-tokens")
    return load_model(model, adapter=adapter, template=template, decoding=decoding)


def _say(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _notice(text: str) -> None:
    click.echo(text, err=True)


def _piped_line() -> str | None:
    return sys.stdin.readline() or None


def _typed_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        _notice("")
        return None


COMMANDS = (chat, serve)
