// The frame around the views: navigation, connection state, language, shortcuts, focus.

import { html, useEffect, useState } from './vendor/htm-preact.js';
import { LANGUAGES, choose, language, t } from './i18n.js';
import { useKeys } from './keys.js';
import { connection } from './live.js';
import { currency } from './money.js';
import { links, route } from './router.js';
import { useStore } from './store.js';
import { Dialog, announcement, focusTitle, focusView } from './ui.js';
import { Accounts } from './views/accounts.js';
import { Flow } from './views/flow.js';
import { Orders } from './views/orders.js';
import { Shop } from './views/shop.js';
import { Timeline } from './views/timeline.js';
import { RequestNotes } from './views/request-notes.js';

const SECTIONS = ['shop', 'orders', 'accounts', 'flow'];

export function App() {
  const { view, id, query } = useStore(route);
  const spoken = useStore(language);
  const [help, setHelp] = useState(false);
  useStore(currency);
  useKeys({ onHelp: () => setHelp(true) });
  useFocusOnRoute(view, id, spoken);
  return html`
    <a class="skip" href="#main" onClick=${skip}>${t('skip')}</a>
    <header class="top">
      <a class="brand" href=${links.shop()}><img src="/assets/icon.svg" alt="" width="28" height="28" /><span>Gozon</span></a>
      <nav aria-label=${t('sections')}>
        ${SECTIONS.map((name) => html`<a key=${name} href=${links[name]()} aria-current=${isCurrent(name, view) ? 'page' : undefined} data-test="nav-${name}">${t(`nav.${name}`)}</a>`)}
      </nav>
      <div class="top-end">
        <${Connection} />
        <${Language} spoken=${spoken} />
      </div>
    </header>
    <main id="main" data-view=${view}>
      <${RequestNotes} />
      <${View} view=${view} id=${id} query=${query} />
    </main>
    <footer class="bottom">
      <a href="/swagger/">${t('api')}</a>
      <button type="button" class="link" onClick=${() => setHelp(true)}>${t('keys.title')} <kbd>?</kbd></button>
    </footer>
    <${Announcer} />
    ${help && html`<${Keys} onClose=${() => setHelp(false)} />`}`;
}

function View({ view, id, query }) {
  switch (view) {
    case 'shop': return html`<${Shop} />`;
    case 'orders': return id ? html`<${Timeline} key=${id} id=${id} />` : html`<${Orders} status=${query.status} userId=${query.user_id} />`;
    case 'accounts': return html`<${Accounts} key=${id} userId=${id} />`;
    case 'flow': return html`<${Flow} />`;
    default: return html`<h1 tabindex="-1">${t('not-found')}</h1><p><a href=${links.shop()}>${t('nav.shop')}</a></p>`;
  }
}

function isCurrent(name, view) {
  return name === view;
}

function skip(event) {
  event.preventDefault();
  focusTitle();
}

function title(view, id) {
  return `${SECTIONS.includes(view) ? id ?? t(`nav.${view}`) : t('not-found')} · Gozon`;
}

/// For screen readers a new view is a new page: announces its title and focuses its heading.
function useFocusOnRoute(view, id, spoken) {
  const [first, setFirst] = useState(true);
  useEffect(() => {
    document.title = title(view, id);
    if (first) return setFirst(false);
    scrollTo(0, 0);
    focusView();
  }, [view, id]);
  useEffect(() => {
    document.title = title(view, id);
  }, [spoken]);
}

function Connection() {
  const state = useStore(connection);
  return html`<span class="pill pill-${state}" role="status" data-test="connection" data-state=${state}><span class="pill-dot" aria-hidden="true"></span>${t(`live.${state}`)}</span>`;
}

function Language({ spoken }) {
  return html`<div class="languages" role="group" aria-label=${t('language')}>
    ${Object.entries(LANGUAGES).map(([tag, name]) => html`<button key=${tag} type="button" lang=${tag} aria-label="${tag.toUpperCase()}, ${name}" aria-pressed=${tag === spoken ? 'true' : 'false'} onClick=${() => choose(tag)} data-test="language-${tag}">${tag.toUpperCase()}</button>`)}
  </div>`;
}

function Announcer() {
  return html`<div class="unseen" role="status" aria-live="polite" data-test="announcement">${useStore(announcement)}</div>`;
}

function Keys({ onClose }) {
  const keys = [['/', 'search'], ['j', 'next'], ['k', 'previous'], ['g s', 'shop'], ['g o', 'orders'], ['g a', 'accounts'], ['g f', 'flow'], ['?', 'help']];
  return html`<${Dialog} title=${t('keys.title')} onClose=${onClose} data-test="keys">
    <dl class="keys">${keys.map(([key, what]) => html`<div key=${key}><dt>${key.split(' ').map((one) => html`<kbd>${one}</kbd> `)}</dt><dd>${t(`keys.${what}`)}</dd></div>`)}</dl>
  <//>`;
}
