"""What the task files of both harnesses share: the built-in questions, and when an answer is right."""

from typing import Any

from casp.data.sources import evaluation_chats
from casp_eval.questions import normalise


def rows(split: str) -> list[dict[str, Any]]:
    """All questions of a built-in split in their order: picture, question, answer and kind."""
    return [
        {
            "image": chat.pictures()[0],
            "question": chat.asked()[0].text(),
            "answer": chat.answer(),
            "kind": chat.kind,
        }
        for chat in evaluation_chats(split, 0, 0)
    ]


def judged(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match after `normalise`, as questions.sh counts it."""
    return {"exact": float(normalise(results[0]) == normalise(document["answer"]))}
