// Finding a setting by its words (webui/train_tab/settings_index.py), and the keys of the Train tab.
(() => {
  const MOST = 12; // matches that are listed
  const WHOLE = 95, HINT = 10; // points of a whole name, and of words that are only in the hint
  const box = () => document.getElementById('find-setting'), list = () => document.getElementById('settings-matching');
  const plain = (text) => text.normalize('NFKC').toLowerCase().replace(/^-+/, '').replace(/[_\-./\s]+/g, ' ').trim();
  const initials = (text) => text.split(' ').map((word) => word[0]).join('');

  let loading = null;
  const load = () => loading ??= fetch(new URL(box().dataset.index, document.baseURI)).then((answer) => {
    if (!answer.ok) throw new Error(answer.status);
    return answer.json();
  }).then((settings) => settings.map((setting) => ({
    ...setting,
    searched: [...setting.names.map((name) => [plain(name), '']), ...setting.theirs.map((name) => [plain(name), name])],
    all: plain([...setting.names, ...setting.theirs, setting.text].join(' ')),
  }))).catch((error) => { loading = null; throw error; });

  // How well a name fits: the whole of it, its beginning, the beginning of a word, any part.
  const fit = (name, text) => name === text ? 100 : name.startsWith(text) ? 80
    : ` ${name}`.includes(` ${text}`) ? 60 : name.includes(text) ? 40 : 0;
  const ranked = (settings, typed) => {
    const text = plain(typed), words = text.split(' ');
    const found = settings.map((setting) => {
      let points = initials(plain(setting.path.split('.').pop())) === text ? 90 : 0, theirs = ''; // lr
      for (const [name, other] of setting.searched) {
        const now = fit(name, text) - (other ? 5 : 0);
        if (now > points) { points = now; theirs = other; }
      }
      if (!points && words.every((word) => setting.searched.some(([name]) => name.includes(word)))) points = 30;
      if (!points && words.every((word) => setting.all.includes(word))) points = HINT;
      // What only other programs have comes last, unless its whole name is typed.
      if (!setting.id) points = points === 100 ? 80 : Math.min(points, HINT - 1);
      return { setting, points, theirs };
    }).filter(({ points }) => points > 0).sort((left, right) => right.points - left.points);
    // Whoever types a whole name is not looking for hints that contain it, too.
    return found[0]?.points >= WHOLE ? found.filter(({ points }) => points > HINT) : found;
  };

  // Why a setting cannot be seen now; '' if it can. What is in a part that was never opened is not on the page yet.
  const hidden = ({ id, part, union, kinds, why }) => {
    if (!id) return why; // of another program
    const gone = (element) => element && getComputedStyle(element).display === 'none';
    const chosen = union && document.querySelector(`#${union} input:checked`)?.value;
    if (chosen ? !kinds.includes(chosen) : gone(document.getElementById(id)) || gone(document.getElementById(part)))
      return why ?? '';
    return '';
  };

  let matches = [], active = -1;
  const close = () => {
    matches = []; active = -1; list().hidden = true; list().replaceChildren();
    box().setAttribute('aria-expanded', 'false'); box().removeAttribute('aria-activedescendant');
  };
  const mark = (at) => {
    active = at;
    [...list().children].forEach((row, place) => row.setAttribute('aria-selected', String(place === at)));
    const row = list().children[at];
    if (row) { box().setAttribute('aria-activedescendant', row.id); row.scrollIntoView({ block: 'nearest' }); }
  };
  const made = (tag, name, text) => Object.assign(document.createElement(tag), { className: name, textContent: text });
  const say = (text) => {
    list().replaceChildren(Object.assign(made('li', 'none', text), { role: 'presentation' })); list().hidden = false;
    document.querySelector('.finder .heard').textContent = text;
  };
  const show = () => {
    list().replaceChildren(...matches.map(({ setting, theirs }, at) => {
      const row = made('li', '', ''), why = hidden(setting);
      row.id = `matching-${at}`; row.dataset.at = at; row.setAttribute('role', 'option');
      if (why) row.setAttribute('aria-disabled', 'true');
      row.append(made('b', '', setting.label), made('span', 'where', setting.where));
      if (setting.id) row.append(made('code', '', theirs ? `${theirs} → ${setting.path}` : setting.path));
      if (why) row.append(made('small', '', why));
      return row;
    }));
    list().hidden = false; box().setAttribute('aria-expanded', 'true'); mark(0);
    document.querySelector('.finder .heard').textContent = '';
  };
  const search = async () => {
    const typed = box().value;
    if (!plain(typed)) return close();
    try {
      const settings = await load();
      if (box().value !== typed) return;
      matches = ranked(settings, typed).slice(0, MOST);
      if (matches.length) show(); else { close(); say(box().dataset.none.replace('{text}', typed)); }
    } catch { say(box().dataset.failed); }
  };
  const choose = (at) => {
    const { setting } = matches[at] ?? {};
    if (!setting?.id) return;
    const instead = hidden(setting) && setting.instead;
    close(); box().value = '';
    // What was not on the page before its part was opened may turn out to be hidden.
    if (instead) athanorLead(instead, setting.insteadPart);
    else athanorLead(setting.id, setting.part, () => setting.instead && athanorLead(setting.instead, setting.insteadPart));
  };

  document.addEventListener('focusin', ({ target }) => { if (target === box()) { load().catch(() => {}); search(); } });
  document.addEventListener('focusout', ({ target }) => { if (target === box()) close(); });
  document.addEventListener('input', ({ target }) => { if (target === box()) search(); });
  document.addEventListener('mousedown', (event) => { if (event.target.closest?.('#settings-matching')) event.preventDefault(); });
  document.addEventListener('click', (event) => {
    const row = event.target.closest?.('#settings-matching [data-at]');
    if (row) choose(Number(row.dataset.at));
  });

  // Whether the key was switched off in this browser, and the button that shows and changes it.
  let off = null;
  const silent = () => { try { return off ?? localStorage.getItem('search-key') === 'off'; } catch { return off ?? false; } };
  window.athanorSearchKey = () => {
    document.getElementById('search-key')?.setAttribute('aria-pressed', String(!silent()));
    if (silent()) box()?.removeAttribute('aria-keyshortcuts'); else box()?.setAttribute('aria-keyshortcuts', '/');
  };
  document.addEventListener('click', ({ target }) => {
    if (target.id !== 'search-key') return;
    off = !silent();
    try { localStorage.setItem('search-key', off ? 'off' : 'on'); } catch { /* private window: until the page is closed */ }
    athanorSearchKey();
  });

  const typing = (target) => target.isContentEditable || target.matches('textarea, select, input:not([type=checkbox], [type=radio], [type=range])');
  document.addEventListener('keydown', (event) => {
    const { key, target } = event, whole = event.ctrlKey || event.metaKey;
    if (event.isComposing || !box()?.offsetParent) return;
    if (key === 'Enter' && whole && !event.repeat && target !== box()) {
      const start = document.getElementById('start'); // a box in a fold of the card has a button of its own
      if (start?.checkVisibility() && !target.closest('.card .fold, .own')) { event.preventDefault(); start.click(); }
    } else if (key === '/' && !whole && !event.altKey && !typing(target) && !silent()) {
      event.preventDefault(); box().focus(); box().select();
    } else if (target === box()) {
      if (key === 'ArrowDown' || key === 'ArrowUp') {
        event.preventDefault();
        if (matches.length) mark((active + (key === 'ArrowDown' ? 1 : -1) + matches.length) % matches.length);
      } else if (key === 'Enter') { event.preventDefault(); choose(active); }
      else if (key === 'Escape') { if (list().hidden) box().blur(); else { box().value = ''; close(); } }
    }
  });
})();
