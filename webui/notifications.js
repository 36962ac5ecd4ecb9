// What happens to one's runs while nobody looks at the page: in its title and, if the browser may, in notifications of
// the browser (webui/notification_pages.py). The studio's page loads this once it is left for the first time; the page
// of one's notifications has the button that allows them. Nobody is asked without a click.
(() => {
  const button = document.querySelector('#browser-allow');
  if (button) {
    const show = () => {
      const state = !window.isSecureContext || !('Notification' in window) ? 'insecure' : Notification.permission;
      for (const part of document.querySelectorAll('[data-browser]')) part.hidden = part.dataset.browser !== state;
    };
    button.addEventListener('click', async () => { await Notification.requestPermission(); show(); });
    return show();
  }

  const POLL_MS = 15_000, MARKS = { finished: '✓', failed: '✗', stopped: '■', stalled: '⚠', space: '⚠', turn: '…' };
  const known = new Set(), news = [];
  let since = null, timer = 0, title = document.title;
  const away = () => document.hidden || !document.hasFocus();
  const address = (path) => location.pathname.replace(/\/?$/, '/') + path;

  const tell = (event) => {
    news.push(event);
    document.title = `${news.length > 1 ? `(${news.length}) ` : ''}${MARKS[event.event] ?? '•'} ${event.name} — Athanor`;
    if (!('Notification' in window) || Notification.permission !== 'granted') return;
    const notification = new Notification(event.title, { body: event.text, tag: event.id, icon: address('favicon.ico') });
    notification.onclick = () => { window.focus(); location.href = address(`?run=${encodeURIComponent(event.run)}`); };
  };

  const look = async () => {
    try {
      const answer = await fetch(address(`notifications/events${since === null ? '' : `?since=${since}`}`));
      if (!answer.ok) return;
      const { at, events } = await answer.json();
      for (const event of events) {
        if (since !== null && !known.has(event.id) && away()) tell(event);
        known.add(event.id);
      }
      since = at;
    } catch { /* the studio does not answer; next time */ }
  };

  const change = () => {
    if (away() && !timer) {
      title = document.title; since = null;
      timer = setInterval(look, POLL_MS); look();
    } else if (!away() && timer) {
      clearInterval(timer); timer = 0;
      if (news.length) { news.length = 0; document.title = title; }
    }
  };
  document.addEventListener('visibilitychange', change);
  addEventListener('blur', change); addEventListener('focus', change);
  change();
})();
