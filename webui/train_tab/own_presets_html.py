"""The presets of users as HTML: a form to save one, the list, and what applying one did."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.core.problems import Problem
from engine.core.rights import Person, may
from engine.runs.own_presets import Applied, OwnPreset
from webui import notices
from webui.train_tab import changed_html
from webui.words import Words

# Sends what is to be done, to which preset, and what is typed and ticked next to the button. Deleting and replacing
# ask once more, until another control has the focus.
ACT_JS = """
const hear = (text) => {
  const heard = element.querySelector('.heard');
  if (heard) heard.textContent = text;
};
const unsure = (button) => {
  button.removeAttribute('data-sure');
  button.textContent = button.dataset.first;
  hear('');
};
const act = (button) => {
  const row = button.closest('[data-preset]'), place = row ?? element, what = button.dataset.do;
  const name = place.querySelector('input[type=text]');
  const ticked = (box) => place.querySelector(`[name=${box}]`)?.checked ?? false;
  const plain = (text) => text.trim().replace(/\\s+/g, ' ');
  const replaced = what === 'save'
    && [...element.querySelectorAll('[data-mine] b')].find((other) => other.textContent === plain(name.value));
  const asks = what === 'delete' ? row.querySelector('b') : replaced;
  if (asks && !button.hasAttribute('data-sure')) {
    button.setAttribute('data-sure', '');
    button.dataset.first = button.textContent;
    button.textContent = button.dataset.really;
    button.focus();  // also where a click does not do that: the question ends with the focus
    hear(`${button.dataset.really}: ${asks.textContent}`);
  } else if (what === 'rename' && !row.hasAttribute('data-renaming')) {
    row.setAttribute('data-renaming', '');
    name.focus();
    name.select();
  } else {
    row?.removeAttribute('data-renaming');
    if (button.hasAttribute('data-sure')) unsure(button);
    const ticks = { changed: ticked('changed'), places: ticked('places'), shared: ticked('shared') };
    trigger('select', { do: what, id: row?.dataset.preset ?? '', name: name?.value ?? '', ...ticks });
  }
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (button) act(button);
});
element.addEventListener('focusout', ({ target }) => {
  if (target.hasAttribute('data-sure')) unsure(target);
});
element.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.isComposing || event.ctrlKey || event.metaKey) return;
  if (event.target.type !== 'text') return;
  const row = event.target.closest('[data-preset]');
  act((row ?? element).querySelector(row ? '[data-do=rename]' : '[data-do=save]'));
});
"""

HEARD = '<p class="heard" role="status"></p>'  # for readers who do not see that a button has changed


def panel(
    presets: Sequence[OwnPreset], broken: Sequence[Problem], person: Person, words: Words, report: str = ""
) -> str:
    """What the reader can open below the presets; `report` is HTML about the last action, and is always shown."""
    rows = "".join(_row(preset, person, words) for preset in presets)
    wrong = "".join(f"<li>{escape(notices.sentence(issue, words))}</li>" for issue in broken)
    saving = "" if may(person, "save-preset") else _saving(person, words)
    if not (saving or rows):
        return report
    code = ("own-presets" if presets else "own-presets-none") if saving else "own-presets-seen"
    summary = escape(words(code, count=len(presets)))
    return (
        f'<details class="own" data-own="presets"><summary>{summary}</summary>{HEARD}{saving}'
        f"{f'<ul>{rows}</ul>' if rows else ''}"
        f"{f'<ul class=problems>{wrong}</ul>' if wrong else ''}</details>{report}"
    )


def _saving(person: Person, words: Words) -> str:
    ticks = ["changed", "places", *(["shared"] if person.name else [])]
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}"> {escape(words(f"preset-{name}"))}</label>' for name in ticks
    )
    save = _button("save", "preset-save", words, f' data-really="{escape(words("preset-replace"))}"')
    return f'<div class="saving">{_name_box("", words)}{save}{boxes}</div>'


def _row(preset: OwnPreset, person: Person, words: Words) -> str:
    of = preset.by if preset.by != person.name else ""
    mine = " data-mine" if preset.by == person.name else ""  # saving under its name replaces it
    about = [words("preset-of", name=of)] if of else []
    if person.name and not of:
        about.append(words("preset-is-shared" if preset.shared else "preset-is-private"))
    buttons = ""
    if may(person, "change-preset", preset.by) is None:
        sharing = "keep" if preset.shared else "share"
        buttons = _button(sharing, f"preset-{sharing}", words) if person.name else ""
        really = escape(words("preset-really"))
        buttons += _button("rename", "preset-rename", words)
        buttons += _button("delete", "preset-delete", words, f' data-really="{really}"')
    return (
        f'<li data-preset="{escape(preset.id)}"{mine}><b>{escape(preset.name)}</b>{_name_box(preset.name, words)}'
        f"<small>{escape(' · '.join(about))}</small><span>{buttons}</span></li>"
    )


def _name_box(value: str, words: Words) -> str:
    label = escape(words("preset-name"))
    return (
        f'<input type="text" value="{escape(value)}" placeholder="{label}" '
        f'aria-label="{label}" autocomplete="off" spellcheck="false">'
    )


def _button(action: str, code: str, words: Words, more: str = "") -> str:
    return f'<button type="button" data-do="{action}"{more}>{escape(words(code))}</button>'


def report(name: str, applied: Applied, words: Words) -> str:
    """What applying a preset has changed, and what could not be used of it."""
    sentence = words("preset-applied", name=name, count=len(applied.changes))
    rows = "".join(changed_html.row(change, words) for change in applied.changes)
    lost = notices.listed(applied.problems, words) if applied.problems else ""
    heading = f'<p class="quiet">{escape(words("preset-not-used"))}</p>' if lost else ""
    return (
        f'<details class="changed" data-own="report"><summary>{escape(sentence)}</summary><ul>{rows}</ul></details>'
        f"{heading}{lost}"
    )
