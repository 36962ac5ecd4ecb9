"""Rows that can be clicked: the script of an HTML component that tells the server which of them was."""

from __future__ import annotations

SCRIPT = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('[data-WHAT]');
  if (!row || event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  trigger('select', { WHAT: row.dataset.WHAT });
});
"""


def rows_of(what: str) -> str:
    """For elements with `data-<what>`. With a modifier key a click is the browser's own way: a new tab."""
    return SCRIPT.replace("WHAT", what)
