// All orders, live, newest first.

import { html, useState } from '../vendor/htm-preact.js';
import { t } from '../i18n.js';
import { useOrderList } from '../order-list.js';
import { go, links, replace } from '../router.js';
import { curl, dev, nats } from '../shell.js';
import { Field, ProblemNote, Shell, LoadingRows } from '../ui.js';
import { OrderRows } from './order-rows.js';

const STATUSES = [undefined, 'NEW', 'FINISHED', 'CANCELLED'];
const ORDER_ID = /^[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}$/i;
const USER_ID = /^[A-Za-z0-9._-]{1,64}$/;

export function Orders({ status, userId }) {
  const wanted = STATUSES.includes(status) ? status : undefined;
  const { orders, problem, more, loadMore } = useOrderList({ userId, status: wanted });
  const query = new URLSearchParams(Object.entries({ user_id: userId, status: wanted }).filter(([, value]) => value));
  const path = `/v1/orders${query.size ? `?${query}` : ''}`;
  return html`
    <h1 tabindex="-1">${t('nav.orders')}</h1>
    <${Search} userId=${userId} status=${wanted} />
    <div class="chips" role="group" aria-label=${t('orders.by-status')}>
      ${STATUSES.map((one) => html`<a key=${one ?? 'all'} class="chip" href=${links.orders({ status: one, user_id: userId })} aria-current=${one === wanted ? 'true' : undefined} data-test="filter-${one ?? 'all'}">${t(one ? `status.${one}` : 'orders.all')}</a>`)}
      ${userId && html`<a class="chip chip-user" href=${links.orders({ status: wanted })} data-test="filter-user" aria-label=${t('orders.not-only', { user: userId })}>${userId} <span aria-hidden="true">✕</span></a>`}
    </div>
    ${problem && html`<${ProblemNote} problem=${problem} />`}
    <section class="card card-flush" aria-label=${t('nav.orders')}>
      ${!orders && !problem && html`<${LoadingRows} rows=${8} />`}
      ${orders && !orders.length && html`<p class="empty">${t('orders.none')} <code>./dev order 1299</code></p>`}
      ${orders?.length > 0 && html`<${OrderRows} orders=${orders} withUser />`}
    </section>
    ${more && html`<button type="button" class="button" onClick=${loadMore} data-test="more">${t('more')}</button>`}
    <${Shell} commands=${[curl(path), dev('order 1299 alice'), nats('stream view ORDERS')]} />`;
}

/// One search field: an order id opens the order, a user name filters the list.
function Search({ userId, status }) {
  const [text, setText] = useState('');
  const [wrong, setWrong] = useState(false);
  const search = (event) => {
    event.preventDefault();
    const wanted = text.trim();
    if (ORDER_ID.test(wanted)) go(links.order(wanted.toLowerCase()));
    else if (wanted === '' || USER_ID.test(wanted)) replace(links.orders({ status, user_id: wanted || userId }));
    else return setWrong(true);
    setText('');
  };
  const type = (event) => {
    setText(event.target.value);
    setWrong(false);
  };
  return html`<form class="search" role="search" onSubmit=${search}>
    <${Field} name="search" type="search" label=${t('orders.search')} value=${text} onInput=${type} error=${wrong && t('orders.search-wrong')} data-search spellcheck=${false}>
      <button type="submit" class="button">${t('orders.search-go')}</button>
    <//>
  </form>`;
}
