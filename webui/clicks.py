"""Scripts for clicks in HTML components: they say which row was clicked, and keep open what a reader has opened."""

from __future__ import annotations

import gradio as gr

from webui.events import QUIET

ROW_CLICK_JS = """
let pressed;
const rowAt = (target) => target?.closest('[data-WHAT]');
element.addEventListener('pointerdown', (event) => { pressed = rowAt(event.target)?.dataset.WHAT; });
element.addEventListener('click', (event) => {
  // If the list was updated while the button was down, the click is only one on the list, and the row is a new one;
  // but a drag from one row to another is no click.
  const here = event.detail ? rowAt(document.elementFromPoint(event.clientX, event.clientY)) : null;
  const row = rowAt(event.target) ?? (here?.dataset.WHAT === pressed ? here : null);
  if (!row || !element.contains(row) || event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  window.athanorClicked = row.dataset.WHAT;
  trigger('select', { WHAT: row.dataset.WHAT });
});
"""


def row_click_js(what: str) -> str:
    """For elements with `data-<what>`. With a modifier key a click keeps its usual effect, such as a new tab."""
    return ROW_CLICK_JS.replace("WHAT", what)


def on_row_click(rows: gr.HTML, opened: gr.Textbox, prefix: str = "") -> None:
    """The id of a clicked row, after a prefix, becomes the value of `opened`. The browser does it alone: if the server
    was asked, a second click would be lost during the first, or undone by a late answer."""
    rows.select(None, None, opened, js=f"() => ['{prefix}' + window.athanorClicked]", **QUIET)


KEEP_SCROLL_JS = """
const places = [];
const lists = () => [...element.querySelectorAll('ul.sets')];
element.addEventListener('scroll', ({ target }) => { places[lists().indexOf(target)] = target.scrollTop; }, true);
const show = () => requestAnimationFrame(() => lists().forEach((list, at) => {
  list.scrollTop = places[at] ?? 0;
  const chosen = list.querySelector('a.on')?.getBoundingClientRect(), frame = list.getBoundingClientRect();
  if (chosen && chosen.height && (chosen.top < frame.top || chosen.bottom > frame.bottom))
    list.scrollTop += chosen.top - frame.top - (frame.height - chosen.height) / 2;
}));
watch('value', show);
let wide = 0;
new ResizeObserver(() => {
  if (wide !== element.clientWidth) { wide = element.clientWidth; show(); }
}).observe(element);
"""


def kept_rows_of(what: str) -> str:
    """The same for a list that scrolls: when it is updated, it keeps its scroll position, with the chosen row in
    view."""
    return row_click_js(what) + KEEP_SCROLL_JS


KEEP_FOLDS_JS = """
const folds = new Map();
const place = (fold) => {
  const item = fold.closest('[data-WHAT]');
  return item.dataset.WHAT + ' ' + [item, ...item.querySelectorAll('details')].indexOf(fold);
};
const keep = () => element.querySelectorAll('[data-WHAT], [data-WHAT] details').forEach((fold) => {
  const open = folds.get(place(fold));
  if (open === undefined) folds.set(place(fold), fold.open); else fold.open = open;
});
element.addEventListener('click', (event) => {
  const fold = event.target.closest('summary')?.parentElement;
  if (fold && element.contains(fold)) folds.set(place(fold), !fold.open);
});
watch('value', keep);
"""


def keep_folds_js(what: str) -> str:
    """For lists of `<details data-<what>="…">`, nested or not: when a list is updated, what the reader has opened stays
    open. New entries keep their initial state."""
    return KEEP_FOLDS_JS.replace("WHAT", what)
