"""How a stage that did not run appears in a document."""

from __future__ import annotations


def skipped(reason: str) -> dict[str, str]:
    """Return the entry of a stage that did not run, with the reason."""
    return {"status": "skipped", "reason": reason}
