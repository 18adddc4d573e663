// Components that all views share.

import { html, useEffect, useRef, useState } from './vendor/htm-preact.js';
import { absolute, now, relative } from './clock.js';
import { t, tOr } from './i18n.js';
import { money } from './money.js';
import { links } from './router.js';
import { store, useStore } from './store.js';

const COPIED_MS = 1_500;

/// For use after the focused element has been removed.
export function focusTitle() {
  document.querySelector('main h1')?.focus({ preventScroll: true });
}

let searchNext = false;

/// Focuses the title of a new view, or its search field if the view was opened for a search.
export function focusView() {
  if (!searchNext || !focusSearch()) focusTitle();
  searchNext = false;
}

/// Focuses the search field. Returns false if there is none; then the next view focuses its own.
export function focusSearch() {
  const field = document.querySelector('[data-search]');
  field?.focus();
  searchNext = !field;
  return Boolean(field);
}

/// Text for screen readers.
export const announcement = store('');

export function announce(text) {
  announcement.set('');
  // A live region is only read out when its text changes.
  setTimeout(() => announcement.set(text), 50);
}

export function Status({ status, reason }) {
  return html`<span class="status status-${status.toLowerCase()}" data-test="status" data-status=${status}>
    <span class="status-dot" aria-hidden="true"></span>${t(`status.${status}`)}${reason && html`<span class="status-reason">${tOr(`reason.${reason}`, reason)}</span>`}
  </span>`;
}

export function Money({ minor, signed }) {
  return html`<span class="money">${money(minor, { signed })}</span>`;
}

export function When({ at }) {
  const time = useStore(now);
  return html`<time class="when" datetime=${at} title=${absolute(at)}>${relative(at, time)}</time>`;
}

export function OrderLink({ id, children }) {
  return html`<a class="order-link" href=${links.order(id)} title=${id}>${children ?? html`<code>${`…${id.slice(-8)}`}</code>`}</a>`;
}

export function Copy({ text, label = t('copy') }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    announce(t('copied'));
    setTimeout(() => setCopied(false), COPIED_MS);
  };
  // Pages without a secure connection have no access to the clipboard.
  if (!navigator.clipboard) return null;
  return html`<button type="button" class="copy" onClick=${copy} aria-label=${label} title=${label} data-test="copy">${copied ? '✓' : html`<${Icon} name="copy" />`}</button>`;
}

export function ProblemNote({ problem }) {
  const title = tOr(`problem.${problem.code}`, problem.title || t('problem.other'));
  return html`<div class="note note-problem" role="alert" data-test="problem" data-code=${problem.code}>
    <strong>${title}</strong>
    ${problem.errors.length > 1 ? html`<ul lang="en">${problem.errors.map(({ pointer, detail }) => html`<li key=${pointer}><code>${pointer}</code> ${detail}</li>`)}</ul>`
      : problem.detail && html`<p lang="en">${problem.detail}</p>`}
    ${problem.step && html`<p><${OutcomeLink} step=${problem.step} /></p>`}
    ${problem.request_id && html`<p class="quiet">${t('request-id')} <code>${problem.request_id}</code> <${Copy} text=${problem.request_id} label=${t('copy-request-id')} /></p>`}
  </div>`;
}

/// A link to where the outcome of an unresolved request is visible.
export function OutcomeLink({ step }) {
  const user = step.body.user_id ?? decodeURIComponent(step.path.split('/')[3]);
  const page = step.kind === 'order' ? 'orders' : 'account';
  return html`${t('given-up.check')} <a href=${page === 'orders' ? links.orders({ user_id: user }) : links.account(user)}>${t(`given-up.${page}`, { user })}</a>`;
}

/// The error text for the field that the JSON pointer names, in the user's language if there is
/// one.
export function fieldError(problem, pointer) {
  const message = problem?.at?.(pointer);
  return message && tOr(`field.${pointer}`, message);
}

/// An input with label, hint and error text.
export function Field({ name, label, hint, error, children, ...attributes }) {
  const described = [hint && `${name}-hint`, error && `${name}-error`].filter(Boolean).join(' ') || undefined;
  return html`<div class="field">
    <label for=${name}>${label}</label>
    <div class="field-row">
      <input id=${name} name=${name} data-test=${name} autocomplete="off" aria-invalid=${error ? 'true' : undefined} aria-describedby=${described} ...${attributes} />
      ${children}
    </div>
    ${hint && html`<p class="field-hint" id=${`${name}-hint`}>${hint}</p>`}
    ${error && html`<p class="field-error" id=${`${name}-error`} role="alert" data-test=${`${name}-error`}>${error}</p>`}
  </div>`;
}

/// Placeholder rows while data is loading, so that the layout does not shift.
export function LoadingRows({ rows = 3 }) {
  return html`<div class="waiting" aria-busy="true" aria-label=${t('loading')}>${Array.from({ length: rows }, () => html`<div class="waiting-row"></div>`)}</div>`;
}

/// The equivalent commands.
export function Shell({ commands }) {
  return html`<details class="shell" data-test="shell">
    <summary>${t('shell')}</summary>
    ${commands.map(([name, command]) => html`<div class="shell-line" key=${name}>
      <span class="shell-name">${name}</span><code>${command}</code><${Copy} text=${command} label=${t('copy-as', { name })} />
    </div>`)}
  </details>`;
}

/// A modal dialog, open at once. The browser keeps the focus inside, and Escape closes it.
export function Dialog({ title, onClose, children, ...attributes }) {
  const dialog = useRef();
  useEffect(() => dialog.current.showModal(), []);
  const closeOutside = (event) => event.target === dialog.current && dialog.current.close();
  return html`<dialog ref=${dialog} class="dialog" aria-labelledby="dialog-title" onClose=${onClose} onClick=${closeOutside} ...${attributes}>
    <div class="dialog-body">
      <header class="dialog-head">
        <h2 id="dialog-title">${title}</h2>
        <button type="button" class="button-quiet" onClick=${() => dialog.current.close()} aria-label=${t('close')}>✕</button>
      </header>
      ${children}
    </div>
  </dialog>`;
}

const ICONS = {
  copy: 'M9 9V5.5A1.5 1.5 0 0 1 10.5 4h8A1.5 1.5 0 0 1 20 5.5v8a1.5 1.5 0 0 1-1.5 1.5H15M5.5 9h8A1.5 1.5 0 0 1 15 10.5v8a1.5 1.5 0 0 1-1.5 1.5h-8A1.5 1.5 0 0 1 4 18.5v-8A1.5 1.5 0 0 1 5.5 9Z',
  tea: 'M5 9h11v5a5 5 0 0 1-5 5h-1a5 5 0 0 1-5-5V9Zm11 1h1.5a2.5 2.5 0 0 1 0 5H16M8 3v3m5-3v3',
  lamp: 'M8.5 4h7l3.5 8H5l3.5-8ZM12 12v7m-4 1h8m.5-8v3',
  book: 'M5 5.5A2.5 2.5 0 0 1 7.5 3H19v15H7.5A2.5 2.5 0 0 0 5 20.5v-15ZM19 18v3H7.5M9 7.5h6',
  bike: 'M5.5 19a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7Zm13 0a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7ZM5.5 15.5 9 8h6l3.5 7.5M12 15.5 9 8m3 7.5L15 8m0 0-.8-2.5h2.3M7.5 8h3',
};

export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="1.5" stroke-linecap="round" stroke-linejoin="round"><path d=${ICONS[name]} /></svg>`;
}
