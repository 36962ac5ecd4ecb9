// The first steps: which one a reader is at is seen from the page, so whatever they do counts, in any order.
(() => {
  const LOOK_MS = 300, LAST = 5;
  const shown = (selector) => { const element = document.querySelector(selector); return element?.checkVisibility() ? element : null; };
  const button = () => document.querySelector('[data-tour]');
  // The furthest step of this reader, 'done' once they have seen enough; of several who share a browser, each their own.
  const key = () => `first-steps:${document.querySelector('#head .who')?.firstChild.textContent ?? ''}`;
  const read = () => { try { return localStorage.getItem(key()); } catch { return 'done'; } };
  const write = (value) => { try { localStorage.setItem(key(), value); } catch { /* private window */ } };
  // Whether a user is done with them is kept by the server, too, so that it counts in any browser.
  const tell = (over) => {
    button().toggleAttribute('data-over', over);
    if (!document.querySelector('#head .who')) return;
    const body = new URLSearchParams({ over: Number(over) });
    fetch(new URL('first-steps', document.baseURI), { method: 'POST', body, keepalive: true }).catch(() => {});
  };
  const TABS = [0, 0, 0, 1, 1, 3]; // of the steps, among the buttons of the tabs

  let texts = null, timer = 0, drawn = '';
  // The step, what to point at, and whether the run of this step has ended otherwise than it should.
  const state = () => {
    const furthest = Number(read()) || 1;
    if (shown('#prompt') && furthest >= 4) { // who looks in before has no adapter to ask
      const answered = shown('#talk .turn .answers') && !shown('#chat-stop');
      return answered ? { step: LAST + 1 } : { step: LAST, target: '#prompt' };
    }
    if (shown('#run-head .badge')) {
      const dot = document.querySelector('#run-head .badge .dot');
      if (dot?.matches('.finished')) return { step: 4, target: shown('#chat-with') ? '#chat-with' : '#run-head .badge' };
      return { step: 3, target: '#run-head .badge', ended: dot?.matches('.failed, .stopped, .interrupted') };
    }
    if (shown('#start') && furthest < 3) {
      const chosen = document.querySelector('#preset input')?.value === texts.demo && shown('#summary .state.right');
      return chosen ? { step: 2, target: '#start' } : { step: 1, target: '#preset' };
    }
    return { step: furthest, target: `#tabs .tab-container button:nth-of-type(${TABS[furthest] + 1})` };
  };

  const ring = Object.assign(document.createElement('div'), { className: 'tour-ring', hidden: true });
  // Beside gradio's container, which the style sheet's rule about motion does not reach out of.
  ring.classList.toggle('still', matchMedia('(prefers-reduced-motion: reduce)').matches);
  const point = (selector) => {
    const box = selector && shown(selector)?.getBoundingClientRect();
    ring.hidden = !box;
    if (box) ring.style.cssText = `left:${box.left - 5}px;top:${box.top - 5}px;width:${box.width + 10}px;height:${box.height + 10}px`;
  };
  let target = '';
  addEventListener('scroll', () => { if (timer) point(target); }, { passive: true, capture: true });
  addEventListener('resize', () => { if (timer) point(target); });

  const made = (tag, name, text) => Object.assign(document.createElement(tag), { className: name, textContent: text });
  const draw = (step, ended) => {
    const bar = document.getElementById('tour') ?? Object.assign(made('section', '', ''), { id: 'tour' });
    bar.setAttribute('aria-label', texts.title);
    const rows = texts.steps.map(({ title }, at) => {
      if (at + 1 !== step) return made('li', at + 1 < step ? 'past' : '', title);
      const row = made('li', 'now', '');
      row.setAttribute('aria-current', 'step');
      row.append(Object.assign(made('button', 'where', title), { type: 'button' }));
      return row;
    });
    const list = made('ol', '', ''), how = made('p', '', step > LAST ? texts.done : ended ? texts.unfinished : texts.steps[step - 1].how);
    list.append(...rows); how.setAttribute('role', 'status');
    if (step === LAST) how.append(' ', Object.assign(made('button', 'insert', texts.insert), { type: 'button' }));
    const close = Object.assign(made('button', 'close', step > LAST ? texts.ended : texts.close), { type: 'button' });
    bar.replaceChildren(made('b', '', texts.title), list, close, how);
    if (!bar.isConnected) document.querySelector('#head header').after(bar);
  };
  const look = () => {
    const { step, target: pointed, ended } = state();
    if (step > Number(read()) && step <= LAST) write(step);
    const drawing = `${step} ${Boolean(ended)}`;
    if (drawing !== drawn || !document.getElementById('tour')) { drawn = drawing; draw(step, ended); }
    // It pulses a few times at each new place: without end, it would keep a part of a core busy.
    if (pointed !== target) ring.getAnimations().forEach((pulse) => { pulse.currentTime = 0; pulse.play(); });
    target = pointed; point(target);
    if (step > LAST) { write('done'); tell(true); clearInterval(timer); timer = 0; }
  };
  const begin = async () => {
    if (timer) return;
    try {
      texts ??= await (await fetch(new URL(button().dataset.tour, document.baseURI))).json();
    } catch { return; } // it is offered again at the next visit
    document.body.append(ring); drawn = '';
    timer ||= setInterval(look, LOOK_MS); look();
  };
  const end = () => {
    clearInterval(timer); timer = 0; write('done'); tell(true);
    ring.remove(); document.getElementById('tour')?.remove();
  };

  // Whoever has begun goes on; it is offered to those who have no runs yet.
  window.athanorFirstSteps = () => {
    const kept = read();
    if (!button() || button().hasAttribute('data-over')) return;
    if (kept !== 'done' && (kept || button().hasAttribute('data-first'))) begin();
  };
  document.addEventListener('click', ({ target: clicked }) => {
    if (clicked.closest?.('[data-tour]')) { if (timer) end(); else { document.getElementById('tour')?.remove(); write(1); tell(false); begin(); } }
    else if (clicked.closest?.('#tour .close')) end();
    else if (clicked.closest?.('#tour .insert')) {
      const box = document.querySelector('#prompt textarea');
      box.value = texts.question; box.dispatchEvent(new Event('input', { bubbles: true })); box.focus();
    } else if (clicked.closest?.('#tour .where') && target) {
      const goal = document.querySelector(target), FOCUSABLE = 'button, input, textarea, a';
      goal?.scrollIntoView({ behavior: 'smooth', block: 'center' });
      (goal?.matches(FOCUSABLE) ? goal : goal?.querySelector(FOCUSABLE))?.focus({ preventScroll: true });
    }
  });
})();
