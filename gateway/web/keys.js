// The keyboard: `/` searches, `j` and `k` go through lists, `g` and a letter go to a view, `?` tells so.

import { useEffect } from './vendor/htm-preact.js';
import { go, links } from './router.js';
import { focusSearch } from './ui.js';

const CHORD_MS = 1_000;
const VIEWS = { s: 'shop', o: 'orders', a: 'accounts', f: 'flow' };

export function useKeys({ onHelp }) {
  useEffect(() => {
    let chordUntil = 0;
    const pressed = (event) => {
      const typing = event.target.closest('input, textarea, select, [contenteditable], dialog');
      if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
      const chord = Date.now() < chordUntil;
      chordUntil = event.key === 'g' ? Date.now() + CHORD_MS : 0;
      if (chord && VIEWS[event.key]) go(links[VIEWS[event.key]]());
      else if (event.key === '/') search();
      else if (event.key === '?') onHelp();
      else if (event.key === 'j') step(1);
      else if (event.key === 'k') step(-1);
      else return;
      event.preventDefault();
    };
    addEventListener('keydown', pressed);
    return () => removeEventListener('keydown', pressed);
  }, []);
}

function search() {
  if (!focusSearch()) go(links.orders());
}

/// From row to row: each has one link that it is about.
function step(by) {
  const rows = [...document.querySelectorAll('[data-row] a.order-link')];
  const here = rows.indexOf(document.activeElement);
  const next = here < 0 ? (by > 0 ? 0 : rows.length - 1) : here + by;
  rows[Math.max(0, Math.min(next, rows.length - 1))]?.focus();
}
