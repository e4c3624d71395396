"""How a document is read as one text by a language model that scores it."""

from __future__ import annotations

from megatron.selection.base import ANSWERING, Document

ANSWER = " A:"
"""Stands between a prompt and its answer, as the released code of arXiv 2410.16208 has it."""


def plain_text(document: Document) -> str:
    """Return a document's text; of a conversation, each answer follows its prompt and ``" A:"``.

    A prompt and an answer are ``prompt + " A:" + answer``.  Turns that are no answers (a system's
    words, a further question) begin on a line of their own.
    """
    if not document.turns:
        return document.text
    text = ""
    for turn in document.turns:
        if turn.role == ANSWERING:
            text += ANSWER + turn.content
        else:
            text += ("\n" if text else "") + turn.content
    return text
