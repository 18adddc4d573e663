// Keyboard shortcuts: `/` searches, `j` and `k` move in lists, `g` and a letter open a view, `?`
// shows them all.

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
      const key = keyOf(event);
      const chord = Date.now() < chordUntil;
      chordUntil = key === 'g' ? Date.now() + CHORD_MS : 0;
      if (chord && VIEWS[key]) go(links[VIEWS[key]]());
      else if (key === '/') search();
      else if (key === '?') onHelp();
      else if (key === 'j') step(1);
      else if (key === 'k') step(-1);
      else return;
      event.preventDefault();
    };
    addEventListener('keydown', pressed);
    return () => removeEventListener('keydown', pressed);
  }, []);
}

/// On a layout without Latin letters, returns the Latin character at the same position.
function keyOf({ key, code, shiftKey }) {
  const [, letter] = /^Key([A-Z])$/.exec(code) ?? [];
  if (letter && /^\P{ASCII}$/u.test(key)) return shiftKey ? letter : letter.toLowerCase();
  return (code === 'Slash' && { '.': '/', ',': '?' }[key]) || key;
}

function search() {
  if (!focusSearch()) go(links.orders());
}

/// Moves the focus from row to row. Each row has one main link.
function step(by) {
  const rows = [...document.querySelectorAll('[data-row] a.order-link')];
  const here = rows.indexOf(document.activeElement);
  const next = here < 0 ? (by > 0 ? 0 : rows.length - 1) : here + by;
  rows[Math.max(0, Math.min(next, rows.length - 1))]?.focus();
}
