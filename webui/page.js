// What a page of text and forms cannot do by itself. No library, nothing loaded from other servers.
(() => {
  const root = document.documentElement;
  const remembered = () => { try { return localStorage.getItem('theme'); } catch { return null; } };

  // ---- light and dark mode: the system's setting until the reader chooses
  const paint = () => { const theme = remembered(); if (theme) document.body.classList.toggle('dark', theme === 'dark'); };
  // Scrollbars follow. A rule and no style of the element, which gradio replaces.
  document.head.insertAdjacentHTML('beforeend', '<style>html:has(> body.dark) { color-scheme: dark; }</style>');
  new MutationObserver(paint).observe(root, { childList: true });
  // gradio also colours the body, once it has loaded
  addEventListener('load', () => { paint(); new MutationObserver(paint).observe(document.body, { attributeFilter: ['class'] }); });

  const text = (selector) => document.querySelector(selector)?.textContent ?? '';

  const copy = async (value) => {
    // The clipboard API exists only on https and localhost; a studio on a LAN often uses plain http.
    if (navigator.clipboard && isSecureContext) return navigator.clipboard.writeText(value);
    const area = document.createElement('textarea');
    area.value = value; area.style.cssText = 'position:fixed;opacity:0';
    document.body.append(area); area.select(); document.execCommand('copy'); area.remove();
  };

  const keep = (blob, name) => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(blob);
    link.download = name; link.click(); setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const save = (value, name) => keep(new Blob([value], { type: 'text/plain' }), name);

  // ---- a chart as a PNG: the SVG with its current colours, its title and its legend, drawn on a canvas
  const LOOK = ['fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'opacity', 'font-size', 'font-family'];
  const picture = async (chart, name) => {
    const svg = chart?.querySelector('svg');
    if (!svg) return;
    const { width, height } = svg.viewBox.baseVal, copy = svg.cloneNode(true), parts = copy.querySelectorAll('*');
    const dress = (from, to) => { const now = getComputedStyle(from); LOOK.forEach((one) => to.style.setProperty(one, now.getPropertyValue(one))); };
    svg.querySelectorAll('*').forEach((one, i) => dress(one, parts[i]));
    const page = getComputedStyle(document.body), ink = getComputedStyle(chart).color, font = getComputedStyle(chart).fontFamily;
    const whole = document.createElementNS(svg.namespaceURI, 'svg'), ruler = document.createElement('canvas').getContext('2d');
    const add = (tag, given, text) => {
      const made = document.createElementNS(svg.namespaceURI, tag);
      Object.entries(given).forEach(([key, value]) => made.setAttribute(key, value));
      if (text) made.textContent = text;
      return whole.appendChild(made);
    };
    const back = add('rect', { width: '100%', height: '100%', fill: page.backgroundColor });
    add('text', { x: 16, y: 28, fill: ink, 'font-size': 15, 'font-weight': 600, 'font-family': font }, chart.querySelector('figcaption b').textContent);
    let x = 16, y = 52;
    ruler.font = `12px ${font}`;
    chart.querySelectorAll('.key').forEach((key) => {
      const wide = 30 + ruler.measureText(key.textContent).width + 16;
      if (x > 16 && x + wide > width - 16) { x = 16; y += 20; }
      const curve = svg.querySelector([...key.classList].filter((one) => one !== 'key').map((one) => `.${one}`).join('') + ' path');
      const stroke = add('line', { x1: x, x2: x + 22, y1: y - 4, y2: y - 4 });
      if (curve) { dress(curve, stroke); stroke.style.opacity = 1; stroke.style.strokeWidth = 2; }
      add('text', { x: x + 28, y, fill: ink, 'font-size': 12, 'font-family': font }, key.textContent);
      x += wide;
    });
    add('g', { transform: `translate(0 ${y + 16})` }).append(...copy.childNodes);
    const high = y + 28 + height, twice = 2;
    back.setAttribute('height', high);
    Object.entries({ width: width * twice, height: high * twice, viewBox: `0 0 ${width} ${high}` }).forEach(([key, value]) => whole.setAttribute(key, value));
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(whole))}`;
    await image.decode();
    const canvas = document.createElement('canvas');
    canvas.width = width * twice; canvas.height = high * twice;
    canvas.getContext('2d').drawImage(image, 0, 0);
    canvas.toBlob((blob) => keep(blob, name), 'image/png');
  };

  // ---- show a field: open the part that holds it, scroll to it, focus it; `otherwise` if the field is not shown there
  const FRAMES = 60; // a part that opens for the first time has to be built
  const lead = (id, part, otherwise) => {
    const shown = () => document.getElementById(id)?.offsetParent;
    const fold = document.getElementById(part)?.querySelector('button.label-wrap');
    if (!shown() && fold && !fold.classList.contains('open')) fold.click();
    const go = (frames) => {
      const field = document.getElementById(id);
      if (!shown()) { if (frames) requestAnimationFrame(() => go(frames - 1)); else otherwise?.(); return; }
      field.scrollIntoView({ behavior: 'smooth', block: 'center' });
      (field.querySelector('input:checked') ?? field.querySelector('input, textarea'))?.focus({ preventScroll: true });
      field.animate([{ boxShadow: '0 0 0 8px var(--accent-soft)', background: 'var(--accent-soft)' }, {}], 1600);
    };
    go(FRAMES);
  };
  window.athanorLead = lead;

  document.addEventListener('click', (event) => {
    const at = (selector) => event.target.closest?.(selector);
    let found;
    if ((found = at('[data-language]'))) {
      event.preventDefault();
      document.cookie = `language=${found.dataset.language};path=/;max-age=31536000;samesite=lax`;
      location.reload();
    } else if ((found = at('[data-theme-switch]'))) {
      const dark = !document.body.classList.contains('dark');
      document.body.classList.toggle('dark', dark);
      try { localStorage.setItem('theme', dark ? 'dark' : 'light'); } catch { /* private window */ }
    } else if ((found = at('[data-copy]'))) {
      const label = found.textContent;
      copy(text(found.dataset.copy)).then(() => {
        found.textContent = found.dataset.done;
        setTimeout(() => { found.textContent = label; }, 1200);
      });
    } else if ((found = at('[data-save]'))) {
      save(text(found.dataset.save), found.dataset.name || 'spec.yaml');
    } else if ((found = at('[data-png]'))) {
      picture(document.querySelector(found.dataset.png), found.dataset.name);
    } else if ((found = at('.problems a, .changed a'))) {
      event.preventDefault(); lead(found.hash.slice(1), found.dataset.part);
    }
  });

  // ---- controls that this person may not use: a note [data-denies] says why, and names them by a selector. The server
  // refuses them in any case.
  const deny = () => {
    const reasons = new Map();
    for (const note of document.querySelectorAll('[data-denies]'))
      for (const part of document.querySelectorAll(note.dataset.denies))
        for (const control of part.matches('button') ? [part] : part.querySelectorAll('button, input'))
          if (!control.disabled || control.hasAttribute('data-denied')) reasons.set(control, note.textContent);
    for (const control of document.querySelectorAll('[data-denied]'))
      if (!reasons.has(control)) { control.disabled = false; control.removeAttribute('data-denied'); control.removeAttribute('title'); }
    for (const [control, why] of reasons) {
      if (!control.disabled) control.disabled = true;
      if (control.title !== why) { control.title = why; control.setAttribute('data-denied', ''); }
    }
  };
  const watchRights = () => {
    if (!document.querySelector('#head .who')) return;  // without a login, everybody may do everything
    let due = 0;
    const soon = () => { due ||= requestAnimationFrame(() => { due = 0; deny(); }); };
    new MutationObserver(soon).observe(document.body, { childList: true, subtree: true, attributeFilter: ['disabled'] });
    soon();
  };

  // ---- debounce: a form is read once nothing in it has changed for a moment (webui.events.on_settled)
  const settling = {};
  let filled = null; // once the page has been filled in; before that, what was settled too early
  window.athanorSettled = (id) => {
    if (filled !== true) { filled = (filled ?? new Set()).add(id); return; }
    clearTimeout(settling[id]);
    settling[id] = setTimeout(() => document.getElementById(id)?.click(), 180);
  };

  // ---- a list to choose from: whether an entry was chosen, or the list only left (webui.events.on_chosen)
  const before = {}; // id of a list → the entry that was chosen when it was opened
  let choosing = null; // the id of the list of which an entry was just chosen
  document.addEventListener('mousedown', ({ target }) => {
    if (target.closest?.('[role=option]')) choosing = target.closest('.block')?.id ?? null;
  }, true);
  document.addEventListener('keydown', ({ key, target, isComposing }) => {
    if (key === 'Enter' && !isComposing && target.matches?.('[role=combobox], [role=listbox]')) choosing = target.closest('.block')?.id ?? null;
  }, true);
  window.athanorOpened = (id, value) => { choosing = null; before[id] = value; return []; };
  window.athanorLeft = (id, value, trigger) => {
    if (choosing !== id) return [id in before ? before[id] : value];
    choosing = null; before[id] = value;
    document.getElementById(trigger)?.click();
    return [value];
  };

  // ---- the form as it was left: without a login, the browser keeps it, otherwise the studio does
  window.athanorKeep = (paths, [preset, ...held]) => {
    if (!document.querySelector('#head .who')) {
      const values = Object.fromEntries(paths.map((path, at) => [path, held[at]]));
      try { localStorage.setItem('form', JSON.stringify({ preset, values })); } catch { /* private window, or full */ }
    }
    return [preset, ...held];
  };
  const left = () => { try { return localStorage.getItem('form') ?? ''; } catch { return ''; } };

  // ---- somebody is looking at a form that is ready: the studio may import the libraries of a training (#looked)
  const LOOK_MS = 20_000;
  let looked = -LOOK_MS, ready = null; // when it was told, and of which summary
  const look = () => {
    const state = document.querySelector('#summary .state.right');
    if (!state?.checkVisibility() || document.hidden || (state === ready && performance.now() - looked < LOOK_MS)) return;
    ready = state; looked = performance.now();
    document.querySelector('#looked')?.click();
  };
  for (const kind of ['pointermove', 'pointerdown', 'keydown', 'scroll'])
    document.addEventListener(kind, look, { passive: true, capture: true });

  // ---- the page is left for the first time: from then on, a script tells what happens to one's runs meanwhile
  const leave = () => {
    if (!document.hidden && document.hasFocus()) return;
    document.removeEventListener('visibilitychange', leave); removeEventListener('blur', leave);
    const script = document.createElement('script');
    script.src = `${location.pathname.replace(/\/?$/, '/')}notifications.js`;
    document.head.append(script);
  };
  document.addEventListener('visibilitychange', leave); addEventListener('blur', leave);

  // ---- the open run is in the address; going back reloads the previous address
  const COMPARED = ['runs', 'curve', 'x', 'smooth', 'log', 'by'];
  let arrived = false; // until the page has read its address, nothing may change it
  // and if the address leads elsewhere, the form is not shown before that: the built page begins with it
  const show = () => root.classList.remove('arriving');
  if (['run', 'tab'].some((name) => new URLSearchParams(location.search).get(name))) {
    root.classList.add('arriving');
    setTimeout(show, 10_000); // should the studio not answer
  }
  // Nothing can be typed or chosen before the page has arrived, since it would be filled in over that.
  const free = () => { root.inert = false; };
  root.inert = true;
  setTimeout(free, 30_000);
  window.athanorArrived = () => {
    const early = filled ?? [];
    filled = true;
    for (const id of early) athanorSettled(id);
    free();
    requestAnimationFrame(show); requestAnimationFrame(watchRights); requestAnimationFrame(athanorFirstSteps); requestAnimationFrame(athanorSearchKey);
    return [];
  };
  window.athanorArrive = () => {
    const query = new URLSearchParams(location.search);
    arrived = true;
    return [
      query.get('run') || '', query.get('tab') || '', query.has('set') ? `set:${query.get('set')}` : '',
      query.get('tab') === 'compare' ? query.toString() : '', query.get('report') || '', left(),
    ];
  };
  window.athanorAddress = (run, tab) => {
    if (!arrived) return;
    const url = new URL(location.href);
    if (run) url.searchParams.set('run', run); else url.searchParams.delete('run');
    if (tab !== 'train' && !run) url.searchParams.set('tab', tab); else url.searchParams.delete('tab');
    if (tab !== 'data') url.searchParams.delete('set');
    if (tab !== 'compare') COMPARED.forEach((name) => url.searchParams.delete(name));
    if (tab !== 'evaluate') url.searchParams.delete('report');
    if (url.href !== location.href) history.pushState({}, '', url);
  };
  // the open data set is in the address too, without a history entry of its own
  window.athanorSet = (id) => {
    const url = new URL(location.href);
    if (arrived && url.searchParams.get('tab') === 'data') {
      if (id.startsWith('set:')) url.searchParams.set('set', id.slice(4)); else url.searchParams.delete('set');
      history.replaceState({}, '', url);
    }
    return [id];
  };
  // and so are the compared runs and the view
  window.athanorCompare = (held) => {
    const url = new URL(location.href);
    if (arrived) {
      url.searchParams.set('tab', 'compare');
      COMPARED.forEach((name, i) => {
        url.searchParams.delete(name);
        for (const value of [held[i]].flat()) if (value !== '' && value !== null && value !== false) url.searchParams.append(name, value);
      });
      history.replaceState({}, '', url);
    }
    return held;
  };
  window.athanorReport = (id, opened) => {
    const url = new URL(location.href);
    const head = document.querySelector('#report-head');  // on a narrow page it is below the form
    if (opened && id && head?.getBoundingClientRect().top > innerHeight) head.scrollIntoView();
    if (!arrived || url.searchParams.get('tab') !== 'evaluate') return;
    if (id) url.searchParams.set('report', id); else url.searchParams.delete('report');
    history.replaceState({}, '', url);
  };
  addEventListener('popstate', () => location.reload());
})();

// ---- the box next to a slider: the input is limited to its bounds before any handler sees it
document.addEventListener('input', (event) => {
  const box = event.target;
  if (box.type !== 'number') return;
  if (box.value === '') event.stopImmediatePropagation();
  else if (box.max !== '' && Number(box.value) > Number(box.max)) box.value = box.max;
  else if (box.min !== '' && Number(box.value) < Number(box.min)) box.value = box.min;
}, true);

// ---- values under the pointer, from the points stored in each chart
(() => {
  const tip = document.createElement('div'); tip.className = 'chart-tip'; tip.hidden = true;
  const rule = document.createElement('div'); rule.className = 'chart-rule'; rule.hidden = true;
  const hide = () => { tip.hidden = rule.hidden = true; };
  document.addEventListener('pointermove', (event) => {
    const svg = event.target.closest?.('.chart svg');
    if (!svg) return hide();
    if (!tip.isConnected) document.body.append(tip, rule);
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal, scale = box.width / view.width;
    const at = (event.clientX - box.left) / scale;
    let lines = [];
    try { lines = JSON.parse(svg.closest('.chart').dataset.points); } catch { return hide(); }
    let found = lines.map((line) => {
      let best = 0;
      line.x.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(line.x[best] - at)) best = i; });
      return { line, best, off: Math.abs(line.x[best] - at) };
    });
    if (!found.length) return hide();
    // The nearest point determines the place. Curves without a point near it are left out; several are listed from the
    // highest to the lowest.
    const nearest = found.reduce((one, other) => (other.off < one.off ? other : one));
    found = found.filter((one) => one.off <= nearest.off + 24 || one.line.x.length < 12);
    if (found.length > 2) found.sort((one, other) => one.line.y[one.best] - other.line.y[other.best]);
    tip.replaceChildren(...[nearest.line.at[nearest.best], ...found].map((one, i) => {
      const row = document.createElement('div');
      if (i === 0) { row.className = 'at'; row.textContent = one; return row; }
      row.className = 'key ' + one.line.role;
      row.textContent = one.line.name + '  ' + one.line.value[one.best];
      return row;
    }));
    const x = box.left + nearest.line.x[nearest.best] * scale;
    tip.hidden = rule.hidden = false;
    rule.style.cssText = `left:${x}px;top:${box.top}px;height:${box.height * 0.86}px`;
    const left = x + 14 + tip.offsetWidth > innerWidth ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.cssText = `left:${left}px;top:${box.top + 12}px`;
  }, { passive: true });
  document.addEventListener('scroll', hide, { passive: true, capture: true });
})();

// ---- zoom: dragging over a part of a chart shows only this part; a double click, or the button, resets it
(() => {
  const band = document.createElement('div'); band.className = 'chart-band'; band.hidden = true;
  const place = (svg, clientX) => {
    const box = svg.getBoundingClientRect(), [low, high, start, end] = svg.dataset.across.split(' ').map(Number);
    const pixel = Math.min(Math.max((clientX - box.left) * svg.viewBox.baseVal.width / box.width, start), end);
    return low + (pixel - start) / (end - start) * (high - low);
  };
  const write = (charts, text) => {
    const field = document.querySelector(`#${charts.dataset.zoom} textarea, #${charts.dataset.zoom} input`);
    if (!field || field.value === text) return;
    field.value = text; field.dispatchEvent(new Event('input', { bubbles: true }));
    document.dispatchEvent(new Event('scroll'));  // the value under the pointer is another one now
  };
  let begun = null;
  document.addEventListener('pointerdown', (event) => {
    const svg = event.target.closest?.('[data-zoom] svg[data-across]');
    if (svg && event.button === 0) begun = { svg, x: event.clientX };
  });
  document.addEventListener('pointermove', (event) => {
    if (!begun || Math.abs(event.clientX - begun.x) < 6) return;
    const box = begun.svg.getBoundingClientRect(), left = Math.max(Math.min(event.clientX, begun.x), box.left);
    const right = Math.min(Math.max(event.clientX, begun.x), box.right);
    if (!band.isConnected) document.body.append(band);
    band.hidden = false;
    band.style.cssText = `left:${left}px;top:${box.top}px;width:${right - left}px;height:${box.height * 0.86}px`;
  }, { passive: true });
  document.addEventListener('pointerup', (event) => {
    const from = begun; begun = null; band.hidden = true;
    if (!from || Math.abs(event.clientX - from.x) < 6) return;
    const charts = from.svg.closest('[data-zoom]'), ends = [place(from.svg, from.x), place(from.svg, event.clientX)];
    if (charts) write(charts, `${charts.dataset.axis}:${Math.min(...ends)}:${Math.max(...ends)}`);
  });
  document.addEventListener('dblclick', (event) => {
    const charts = event.target.closest?.('[data-zoom] svg')?.closest('[data-zoom]');
    if (charts) write(charts, '');
  });
  document.addEventListener('click', (event) => {
    const charts = event.target.closest?.('.zoom-out')?.closest('[data-zoom]');
    if (charts) write(charts, '');
  });
})();

// ---- dropping a file on the upload button is the same as choosing it with a click
(() => {
  const zone = (event) => event.dataTransfer?.types.includes('Files') && document.querySelector('#upload');
  const shown = (event, on) => zone(event)?.classList.toggle('over', on);
  document.addEventListener('dragover', (event) => { if (zone(event)?.offsetParent) { event.preventDefault(); shown(event, true); } });
  document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) shown(event, false); });
  document.addEventListener('drop', (event) => {
    const button = zone(event);
    if (!button?.offsetParent || event.defaultPrevented) return;
    event.preventDefault(); shown(event, false);
    const input = button.parentElement.querySelector('input[type=file]');
    if (!input || !event.dataTransfer.files.length) return;
    const one = new DataTransfer(); one.items.add(event.dataTransfer.files[0]);
    input.files = one.files;
    input.dispatchEvent(new Event('change', { bubbles: true }));
  });
})();
