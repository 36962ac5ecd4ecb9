"""The script of the review of a draft: buttons and keys.

    J or ↓, K or ↑   the next and the previous row       A   accept        R   reject
    E                edit                                U   undo          P   show the passage
    Ctrl+Enter       save an edited row and accept it    Esc cancel

It remembers at which row a reader is, so that after a decision the next row is in its place, which passages are open,
and what is being edited, because each update replaces all rows.
"""

from __future__ import annotations

REVIEW_JS = """
let at = 0, edited = null;
const unfolded = new Set();
const KEYS = { a: 'accept', r: 'reject', u: 'undo', e: 'edit', p: 'passage', j: 'next', k: 'before',
               ArrowDown: 'next', ArrowUp: 'before' };
const rows = () => [...element.querySelectorAll('article[data-row]')];
const mark = (focus) => {
  const every = rows();
  at = Math.max(0, Math.min(at, every.length - 1));
  every.forEach((row, place) => row.classList.toggle('at', place === at));
  if (focus && every[at]) every[at].focus();
};
const send = (act, values = {}) => trigger('select', { act, ...values });
const editing = (row, on) => {
  row.classList.toggle('editing', on);
  edited = on ? { row: row.dataset.row, ...fields(row) } : null;
  if (on) row.querySelector('textarea').focus(); else row.focus();
};
const restore = () => {
  for (const row of rows()) {
    row.querySelector('details').open = unfolded.has(row.dataset.row);
    if (edited?.row !== row.dataset.row) continue;
    const kept = edited;
    row.querySelectorAll('textarea').forEach((box) => { box.value = kept[box.name]; });
    editing(row, true);
  }
};
const fields = (row) => Object.fromEntries([...row.querySelectorAll('textarea')].map((box) => [box.name, box.value]));
const act = (name, row) => {
  if (name === 'next' || name === 'before') {
    at += name === 'next' ? 1 : -1; mark(true);
  } else if (!row) {
    return;
  } else if (name === 'passage') {
    row.querySelector('summary').click();
  } else if (name === 'edit' || name === 'cancel') {
    editing(row, name === 'edit');
  } else {
    const values = { row: row.dataset.row, ...(name === 'keep' ? fields(row) : {}) };
    if (name === 'keep') editing(row, false);
    send(name === 'keep' ? 'edit' : name, values);
  }
};
element.addEventListener('input', (event) => {
  const row = event.target.closest('article.editing');
  if (row) edited = { row: row.dataset.row, ...fields(row) };
});
element.addEventListener('toggle', (event) => {
  const row = event.target.closest('article[data-row]');
  if (row) unfolded[event.target.open ? 'add' : 'delete'](row.dataset.row);
}, true);
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]'), row = event.target.closest('article[data-row]');
  if (row) { at = rows().indexOf(row); mark(false); }
  if (!button) return;
  event.preventDefault();
  const { act: name, filter, page, format } = button.dataset;
  if (row) act(name, row);
  else if (name === 'show') { at = 0; send(name, { filter, page: Number(page || 1) }); }
  else if (name === 'accept-supported') send(name, { least: element.querySelector('[name=least]').value });
  else if (name === 'ask-remove') element.querySelector('.sure').hidden = false;
  else if (name === 'keep-draft') element.querySelector('.sure').hidden = true;
  else send(name, { format });
});
document.addEventListener('keydown', (event) => {
  if (event.isComposing || !element.isConnected || !element.offsetParent) return;
  const row = event.target.closest?.('#draft article[data-row]');
  if (event.target.matches?.('textarea, input, select, [contenteditable]')) {
    if (!row) return;
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); act('keep', row); }
    if (event.key === 'Escape') { event.preventDefault(); act('cancel', row); }
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const name = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const inside = event.target === document.body || element.contains(event.target) || event.target.closest('#drafts');
  if (!name || !inside || (event.key.startsWith('Arrow') && !row) || !rows().length) return;
  event.preventDefault();
  act(name, rows()[at]);
});
watch('value', () => {
  const focused = document.activeElement === document.body || element.contains(document.activeElement);
  requestAnimationFrame(() => { restore(); if (!edited) mark(focused); });
});
"""
