"""The words that prompts of several benchmarks share."""

from __future__ import annotations

SINGLE_WORD = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
YES_OR_NO = "Please answer yes or no."


def bare(prompt: str) -> str:
    """Return a question without an image's mark and the words that say how to answer.

    Blanks and newlines in a row are one blank: MME has two before its suffix in some questions.
    """
    for words in ("<image>", SINGLE_WORD.strip(), OPTION_LETTER.strip(), YES_OR_NO):
        prompt = prompt.replace(words, " ")
    return " ".join(prompt.split())
