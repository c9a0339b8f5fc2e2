"""Diagnostic sections: what a run that looks at its model again adds to a summary.

They stand under `summary["diagnostics"]`, by name, each a plain dict. A section that ran holds
`status: "ok"`, `gates` (by name: True holds, False fails, None could not be decided), `thresholds`,
`warnings` (one line each) and its figures. What did not run is `{"status": "skipped", "reason"}`; a
section that is absent was never asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast


def skipped(reason: str) -> dict[str, str]:
    """Return the section of a stage that did not run, with the reason."""
    return {"status": "skipped", "reason": reason}


def ran(sections: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    """Return a section that ran, None when it is absent, skipped or failed."""
    section = (sections or {}).get(name)
    if not isinstance(section, Mapping):
        return None
    found = cast("Mapping[str, Any]", section)
    return found if found.get("status", "ok") == "ok" else None


def why_not(sections: Mapping[str, Any] | None, name: str, otherwise: str) -> dict[str, str]:
    """Return the {status, reason} of a section that did not run; `otherwise` where it is absent."""
    section = (sections or {}).get(name)
    if isinstance(section, Mapping):
        found = cast("Mapping[str, Any]", section)
        if found.get("status") not in (None, "ok"):
            return {"status": str(found["status"]), "reason": str(found.get("reason", ""))}
    return skipped(otherwise)
