// Small parts that all views are made of.

import { html, useEffect, useRef, useState } from './vendor/htm-preact.js';
import { absolute, now, relative } from './clock.js';
import { t, tOr } from './i18n.js';
import { money } from './money.js';
import { links } from './router.js';
import { store, useStore } from './store.js';

const COPIED_MS = 1_500;

/// After what had the focus is gone.
export function focusTitle() {
  document.querySelector('main h1')?.focus({ preventScroll: true });
}

let searchNext = false;

/// What a new view begins with: its title, unless it was opened to search in it.
export function focusView() {
  if (!searchNext || !focusSearch()) focusTitle();
  searchNext = false;
}

/// Whether there is something to search here; else the next view is searched.
export function focusSearch() {
  const field = document.querySelector('[data-search]');
  field?.focus();
  searchNext = !field;
  return Boolean(field);
}

/// What a screen reader says next.
export const announcement = store('');

export function announce(text) {
  announcement.set('');
  // A region whose text does not change says nothing.
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
  // Without a secure connection browsers have no clipboard for pages.
  if (!navigator.clipboard) return null;
  return html`<button type="button" class="copy" onClick=${copy} aria-label=${label} title=${label} data-test="copy">${copied ? '✓' : html`<${Icon} name="copy" />`}</button>`;
}

export function ProblemNote({ problem }) {
  const title = tOr(`problem.${problem.code}`, problem.title || t('problem.other'));
  return html`<div class="note note-problem" role="alert" data-test="problem" data-code=${problem.code}>
    <strong>${title}</strong>
    ${problem.errors.length > 1 ? html`<ul lang="en">${problem.errors.map(({ pointer, detail }) => html`<li key=${pointer}><code>${pointer}</code> ${detail}</li>`)}</ul>`
      : problem.detail && html`<p lang="en">${problem.detail}</p>`}
    ${problem.step && html`<p><${WhereItShows} step=${problem.step} /></p>`}
    ${problem.request_id && html`<p class="quiet">${t('request-id')} <code>${problem.request_id}</code> <${Copy} text=${problem.request_id} label=${t('copy-request-id')} /></p>`}
  </div>`;
}

/// Where to look whether a request was done whose outcome is not known.
export function WhereItShows({ step }) {
  const user = step.body.user_id ?? decodeURIComponent(step.path.split('/')[3]);
  const place = step.kind === 'order' ? 'orders' : 'account';
  return html`${t('given-up.look')} <a href=${place === 'orders' ? links.orders({ user_id: user }) : links.account(user)}>${t(`given-up.${place}`, { user })}</a>`;
}

/// What is said beside a field: by the page, or by the API about the place that `pointer` names.
export function fieldError(problem, pointer) {
  const said = problem?.at?.(pointer);
  return said && tOr(`field.${pointer}`, said);
}

/// A labelled field; `error` is what is wrong with it.
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

/// Space for what is being read, so that nothing jumps when it comes.
export function Waiting({ rows = 3 }) {
  return html`<div class="waiting" aria-busy="true" aria-label=${t('loading')}>${Array.from({ length: rows }, () => html`<div class="waiting-row"></div>`)}</div>`;
}

/// The same, without this page.
export function Shell({ commands }) {
  return html`<details class="shell" data-test="shell">
    <summary>${t('shell')}</summary>
    ${commands.map(([name, command]) => html`<div class="shell-line" key=${name}>
      <span class="shell-name">${name}</span><code>${command}</code><${Copy} text=${command} label=${t('copy-as', { name })} />
    </div>`)}
  </details>`;
}

/// Opens at once, above everything else; the browser keeps the focus inside and Escape closes it.
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
