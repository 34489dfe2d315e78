"""A conversation about one picture, in a terminal or from a file of questions.

what is on the table?
/image other.jpg     another picture, and a new conversation
/reset               a new conversation about the same picture
/quit                the end, as is the end of the input
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from manifests.errors import UserError
from train.serve.generate import Chatter
from train.serve.prompts import Question, Round, read_image

Say = Callable[[str], object]
Ask = Callable[[], str | None]

COMMANDS = "/image PATH, /reset, /quit"


@dataclass
class Conversation:
    """One picture, or none, and the rounds about it so far."""

    chatter: Chatter
    image: Image.Image | None = None
    rounds: list[Round] = field(default_factory=list)

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer's pieces; a round that is stopped, or fails, leaves no trace.

        Raises: UserError.
        """
        images = () if self.image is None else (self.image,)
        pieces = []
        for piece in self.chatter.stream(Question(text, images, tuple(self.rounds))):
            pieces.append(piece)
            yield piece
        self.rounds.append(Round(text, "".join(pieces)))

    def show(self, image: Image.Image | None) -> None:
        """Begin anew, about this picture."""
        self.image = image
        self.reset()

    def reset(self) -> None:
        """Forget the rounds."""
        self.rounds.clear()


def chat(chatter: Chatter, image: str | None, say: Say, ask: Ask, complain: Say) -> None:
    """Answer line after line, until `ask` returns None or /quit.

    Args:
        image: path of the first picture, or None.
        say: takes an answer's pieces, and the newline behind it.
        ask: returns the next line.
        complain: takes what went wrong, and notices; the conversation goes on.

    Raises: UserError, only when the first picture cannot be read.
    """
    talk = Conversation(chatter, None if image is None else read_image(image))
    while (line := ask()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        try:
            if command.startswith("/"):
                complain(_obey(talk, command, rest.strip()))
            elif command:
                _answer(talk, line.strip(), say)
        except UserError as error:
            complain(str(error))


def _answer(talk: Conversation, text: str, say: Say) -> None:
    """Say the answer; Ctrl-C stops it, and the conversation goes on without it."""
    pieces = talk.ask(text)
    try:
        for piece in pieces:
            say(piece)
    except KeyboardInterrupt:
        say(" ...")
    say("\n")


def _obey(talk: Conversation, command: str, rest: str) -> str:
    """Do what a command says and return a notice."""
    if command == "/reset":
        talk.reset()
        return "a new conversation"
    if command == "/image" and rest:
        talk.show(read_image(rest))
        return f"a new conversation about {rest}"
    raise UserError(f"{command} is no command here.", fix=f"The commands are {COMMANDS}.")
