// Rows of orders, for the shop and for the list of all orders.

import { html } from '../vendor/htm-preact.js';
import { t } from '../i18n.js';
import { links } from '../router.js';
import { Money, OrderLink, Status, When } from '../ui.js';

export function OrderRows({ orders, withUser }) {
  return html`<ul class="rows" data-test="orders">
    ${orders.map((order) => html`<li key=${order.id} class=${`row ${order.changed ? 'row-changed' : ''}`} data-row data-test="order" data-id=${order.id} data-status=${order.status}>
      <div class="row-main">
        <${OrderLink} id=${order.id}><span class="row-title">${order.description || t('order.undescribed')}</span><//>
        <span class="row-facts">
          ${withUser && html`<a href=${links.account(order.user_id)}>${order.user_id}</a> · `}<${When} at=${order.created_at} /><span class="row-id"> · <code title=${order.id}>…${order.id.slice(-8)}</code></span>
        </span>
      </div>
      <${Status} status=${order.status} reason=${order.reason} />
      <${Money} minor=${order.amount} />
    </li>`)}
  </ul>`;
}
