// The way of one order: every step from the request to the end, with the time that each took, and every repetition that
// was recognised and changed nothing.

import { html, useEffect, useState } from '../vendor/htm-preact.js';
import { absolute, duration, precise, timeOfDay } from '../clock.js';
import { t, tOr } from '../i18n.js';
import { latest } from '../known.js';
import { onChange, opened } from '../live.js';
import { askCurrency, money } from '../money.js';
import { useResource } from '../resource.js';
import { links } from '../router.js';
import { curl, just, nats } from '../shell.js';
import { useStore } from '../store.js';
import { Copy, Money, ProblemNote, Shell, Status, Waiting, When } from '../ui.js';
import { MessageDrawer } from './message-drawer.js';

/// While the order is under way, a service is away, or its end is not published yet.
const AGAIN_MS = 1_500;

export function Timeline({ id }) {
  const turn = useStore(opened);
  const order = useResource(`/v1/orders/${encodeURIComponent(id)}`, turn);
  const way = useResource(`/v1/orders/${encodeURIComponent(id)}/timeline`, turn);
  const [message, setMessage] = useState();
  const reload = () => {
    order.reload();
    way.reload();
  };
  useEffect(() => onChange((change) => change.order_id === id && reload()), [id]);
  const known = order.data && latest(order.data);
  const settled = known && way.data && isWhole(known, way.data);
  useEffect(() => {
    if (!way.data || settled) return;
    const timer = setTimeout(reload, AGAIN_MS);
    return () => clearTimeout(timer);
  }, [way.data, settled]);
  useEffect(() => {
    if (known) askCurrency(known.user_id);
  }, [known?.user_id]);

  if (order.problem && !known) return html`<h1 tabindex="-1">${t('timeline.title')}</h1><${ProblemNote} problem=${order.problem} />`;
  const steps = way.data && measured(way.data.steps);
  return html`
    <p class="crumb"><a href=${links.orders()}>← ${t('nav.orders')}</a></p>
    <h1 tabindex="-1">${known ? known.description || t('order.undescribed') : '\u2007'}</h1>
    <${Summary} id=${id} order=${known} steps=${steps} />
    ${way.data?.missing.map((service) => html`<div key=${service} class="note note-waiting" role="status" data-test="missing"><strong>${t('timeline.missing', { service })}</strong><p>${t('timeline.missing-why')}</p></div>`)}
    ${way.data?.pruned && html`<div class="note" data-test="pruned"><p>${t('timeline.pruned')}</p></div>`}
    ${way.problem && html`<${ProblemNote} problem=${way.problem} />`}
    ${!steps && !way.problem && html`<${Waiting} rows=${8} />`}
    ${steps && html`<${Bar} steps=${steps} />
      <ol class="way" data-test="timeline">${steps.map((step, place) => html`<${Step} key=${`${step.service}${step.step}${step.event_id}${step.n}${place}`} step=${step} onMessage=${() => setMessage(step)} />`)}</ol>`}
    <${Shell} commands=${[curl(`/v1/orders/${id}/timeline`), just(`trace ${id}`), nats(`stream view ORDERS --subject 'gozon.orders.>'`)]} />
    ${message && html`<${MessageDrawer} step=${message} published=${way.data.steps.find((step) => step.step === 'published' && step.event_id === message.event_id && step.n === message.n)} onClose=${() => setMessage(undefined)} />`}`;
}

function Summary({ id, order, steps }) {
  const end = steps?.findLast((step) => step.step === 'ended');
  return html`<div class="card summary" data-test="summary">
    <dl>
      <div><dt>${t('summary.status')}</dt><dd>${order ? html`<${Status} status=${order.status} reason=${order.reason} />` : '\u2007'}</dd></div>
      <div><dt>${t('summary.amount')}</dt><dd>${order && html`<${Money} minor=${order.amount} />`}</dd></div>
      <div><dt>${t('summary.user')}</dt><dd>${order && html`<a href=${links.account(order.user_id)}>${order.user_id}</a>`}</dd></div>
      <div><dt>${t('summary.placed')}</dt><dd>${order && html`<${When} at=${order.created_at} />`}</dd></div>
      <div><dt>${t('summary.took')}</dt><dd data-test="took">${end ? duration(end.total) : '—'}</dd></div>
    </dl>
    <p class="summary-id"><code>${id}</code> <${Copy} text=${id} label=${t('copy-id')} /></p>
  </div>`;
}

/// Where the time went, to scale, until the order ended.
function Bar({ steps }) {
  const until = steps.findLastIndex((step) => step.step === 'ended');
  const parts = steps.slice(1, until + 1).filter((step) => step.delta > 0);
  const total = parts.at(-1)?.total;
  if (!total) return null;
  let x = 0;
  const drawn = parts.map((step) => {
    const part = { step, x, width: (100 * step.delta) / total };
    x += part.width;
    return part;
  });
  return html`<figure class="bar" data-test="bar">
    <svg viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label=${t('timeline.bar')}>
      ${drawn.map(({ step, x, width }, place) => html`<rect key=${place} class=${`bar-part bar-${step.service} ${step.slowest ? 'is-slowest' : ''}`} x=${x} y="0" width=${Math.max(0.2, width - 0.25)} height="6"><title>${title(step)}: ${duration(step.delta)}</title></rect>`)}
    </svg>
    <figcaption><span class="badge badge-orders">orders</span><span class="badge badge-payments">payments</span><span class="bar-total">${duration(total)}</span></figcaption>
  </figure>`;
}

function Step({ step, onMessage }) {
  const ignored = step.step === 'repeated';
  return html`<li class=${`step step-${step.step} step-of-${step.service} ${step.slowest ? 'is-slowest' : ''}`} data-test="step" data-step=${step.step} data-service=${step.service}>
    <span class="step-delta" title=${absolute(step.at)}>${step.delta === undefined ? timeOfDay(step.at) : `+${duration(step.delta)}`}</span>
    <span class="step-dot" aria-hidden="true"></span>
    <div class="step-body">
      <p class="step-title">${title(step)} <span class=${`badge badge-${step.service}`}>${step.service}</span>${step.slowest && html`<span class="badge badge-slow" data-test="slowest">${t('timeline.slowest')}</span>`}</p>
      <p class="step-facts">${facts(step).map((fact, place) => html`<span key=${place}>${fact}</span>`)}
        ${step.message && html`<button type="button" class="link" onClick=${onMessage} data-test="message">${t('timeline.message')}</button>`}
        ${ignored && html`<span class="unseen">${t('timeline.ignored')}</span>`}
      </p>
    </div>
  </li>`;
}

function title(step) {
  const event = tOr(`event.${step.event}`, step.event ?? '');
  const name = step.n > 0 && step.step === 'enqueued' ? 'enqueued-again' : step.step;
  return t(`step.${name}`, { event, n: step.n > 0 && name === 'enqueued-again' ? step.n : step.times ?? 0, service: step.service, outcome: step.outcome && tOr(`outcome.${step.outcome}`, step.outcome) });
}

function facts(step) {
  const said = [];
  if (step.step === 'placed') said.push('POST /v1/orders → 201');
  if (step.stream_sequence && step.step !== 'repeated') said.push(t('fact.sequence', { n: step.stream_sequence, stream: streamOf(step) }));
  if (step.step === 'published') said.push(t('fact.attempts', { n: step.times ?? 1 }));
  if (step.step === 'taken') said.push(t('fact.delivery', { n: step.times ?? 1 }));
  if (step.reason) said.push(tOr(`reason.${step.reason}`, step.reason));
  if (step.balance_after !== undefined) said.push(t('fact.balance', { amount: money(step.balance_after) }));
  if (step.delta !== undefined) said.push(timeOfDay(step.at));
  return said;
}

function streamOf(step) {
  return step.event?.startsWith('gozon.payment.') ? 'PAYMENTS' : 'ORDERS';
}

/// Each step with the time since the one before and since the first. What was only repeated delayed nothing.
function measured(steps) {
  const first = steps.length && precise(steps[0].at);
  let before;
  const all = steps.map((step) => {
    const at = precise(step.at);
    const delta = before === undefined ? undefined : Math.max(0, at - before);
    before = at;
    return { ...step, delta, total: at - first };
  });
  const end = all.findLastIndex((step) => step.step === 'ended');
  const counted = all.slice(0, end < 0 ? undefined : end + 1).filter((step) => step.step !== 'repeated' && step.delta);
  const slowest = counted.reduce((most, step) => (step.delta > (most?.delta ?? 0) ? step : most), undefined);
  if (slowest) slowest.slowest = true;
  return all;
}

/// Nothing more is expected: the order ended, its end is published, and both services answered.
function isWhole(order, way) {
  if (order.status === 'NEW' || way.missing.length) return false;
  const published = way.steps.filter((step) => step.step === 'published').length;
  return way.pruned || published >= way.steps.filter((step) => step.step === 'enqueued').length;
}
