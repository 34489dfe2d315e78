"""The words that prompts of several benchmarks share."""

from __future__ import annotations

SINGLE_WORD = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT_SENTENCE = "Answer the question directly with a short sentence or phrase."
YES_OR_NO = "Please answer yes or no."


def bare(prompt: str) -> str:
    """Return a question without an image's mark and the words that say how to answer.

    Blanks and newlines in a row are one blank: MME has two before its suffix in some questions.
    """
    endings = (SINGLE_WORD.strip(), OPTION_LETTER.strip(), SHORT_SENTENCE, YES_OR_NO)
    for words in ("<image>", *endings):
        prompt = prompt.replace(words, " ")
    return " ".join(prompt.split())
