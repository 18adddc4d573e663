// The timeline of an order: every step with its duration, and every duplicate that was ignored.

import { html, useEffect, useState } from '../vendor/htm-preact.js';
import { absolute, duration, now, precise, timeOfDay } from '../clock.js';
import { t, tOr } from '../i18n.js';
import { latest } from '../known.js';
import { onChange, reloads } from '../live.js';
import { askCurrency, money } from '../money.js';
import { useResource } from '../resource.js';
import { links } from '../router.js';
import { curl, dev, nats } from '../shell.js';
import { useStore } from '../store.js';
import { Copy, Money, ProblemNote, Shell, Status, LoadingRows, When } from '../ui.js';
import { MessageDrawer } from './message-drawer.js';

/// Read interval while the order is NEW, a service is unavailable, or the final event is
/// unpublished.
const AGAIN_MS = 1_500;
/// Steps closer than this are shown as simultaneous.
const INSTANT_MS = 0.05;
const WRITTEN = ['placed', 'taken', 'decided', 'ended', 'enqueued'];

export function Timeline({ id }) {
  const reloadCount = useStore(reloads);
  const order = useResource(`/v1/orders/${encodeURIComponent(id)}`, reloadCount);
  const timeline = useResource(`/v1/orders/${encodeURIComponent(id)}/timeline`, reloadCount);
  const [message, setMessage] = useState();
  const reload = () => {
    order.reload();
    timeline.reload();
  };
  useEffect(() => onChange((change) => change.order_id === id && reload()), [id]);
  const known = order.data && latest(order.data);
  const settled = known && timeline.data && isComplete(known, timeline.data);
  useEffect(() => {
    if (!timeline.data || settled) return;
    const timer = setTimeout(reload, AGAIN_MS);
    return () => clearTimeout(timer);
  }, [timeline.data, settled]);
  useEffect(() => {
    if (known) askCurrency([known.user_id]);
  }, [known?.user_id]);

  if (order.problem && !known) return html`<h1 tabindex="-1">${t('timeline.title')}</h1><${ProblemNote} problem=${order.problem} />`;
  const steps = timeline.data && measured(timeline.data.steps);
  const request = steps?.find((step) => step.step === 'published');
  return html`
    <p class="crumb"><a href=${links.orders()}>← ${t('nav.orders')}</a></p>
    <h1 tabindex="-1">${known ? known.description || t('order.undescribed') : '\u2007'}</h1>
    <div class="columns columns-timeline">
    <${Summary} id=${id} order=${known} steps=${steps} />
    <div class="stack">
    ${timeline.data?.missing.map((service) => html`<div key=${service} class="note note-waiting" role="status" data-test="missing"><strong>${t('timeline.missing', { service })}</strong><p>${t('timeline.missing-why')}</p></div>`)}
    ${timeline.data?.pruned && html`<div class="note" data-test="pruned"><p>${t('timeline.pruned')}</p></div>`}
    ${timeline.problem && html`<${ProblemNote} problem=${timeline.problem} />`}
    ${!steps && !timeline.problem && html`<${LoadingRows} rows=${16} />`}
    ${steps && html`<${Bar} steps=${steps} />
      <ol class="card timeline" data-test="timeline">${transactions(steps).map((group, index) => {
        const drawn = group.map((step) => html`<${Step} key=${`${step.step}${step.event_id}${step.n}`} step=${step} onMessage=${() => setMessage(step)} />`);
        return group.length === 1 ? drawn : html`<li key=${`group${index}`} class="transaction"><ol aria-label=${t('timeline.transaction')}>${drawn}</ol><p class="transaction-name" aria-hidden="true">${t('timeline.transaction')}</p></li>`;
      })}${known?.status === 'NEW' && html`<${InProgress} since=${steps.at(-1).at} />`}</ol>`}
    </div></div>
    <${Shell} commands=${[curl(`/v1/orders/${id}/timeline`), dev(`trace ${id}`), nats(request?.stream_sequence ? `stream get ORDERS ${request.stream_sequence}` : 'stream view ORDERS')]} />
    ${message && html`<${MessageDrawer} step=${message} published=${timeline.data.steps.find((step) => step.step === 'published' && step.event_id === message.event_id && step.n === message.n)} onClose=${() => setMessage(undefined)} />`}`;
}

function Summary({ id, order, steps }) {
  const end = steps?.findLast((step) => step.step === 'ended');
  return html`<section class="card summary" aria-label=${t('timeline.title')} data-test="summary">
    <dl>
      <div><dt>${t('summary.status')}</dt><dd>${order ? html`<${Status} status=${order.status} reason=${order.reason} />` : '\u2007'}</dd></div>
      <div><dt>${t('summary.amount')}</dt><dd>${order && html`<${Money} minor=${order.amount} />`}</dd></div>
      <div><dt>${t('summary.user')}</dt><dd>${order && html`<a href=${links.account(order.user_id)}>${order.user_id}</a>`}</dd></div>
      <div><dt>${t('summary.placed')}</dt><dd>${order ? html`<${When} at=${order.created_at} />` : '\u2007'}<span class="summary-more">${order ? absolute(order.created_at) : '\u2007'}</span></dd></div>
      <div><dt>${t('summary.took')}</dt><dd data-test="took">${end ? duration(end.total) : '—'}</dd></div>
    </dl>
    <p class="summary-id"><code>${id}</code> <${Copy} text=${id} label=${t('copy-id')} /></p>
  </section>`;
}

/// The time per step until the order was final, to scale.
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
      ${drawn.map(({ step, x, width }, index) => html`<rect key=${index} class=${`bar-part bar-${step.service} ${step.slowest ? 'is-slowest' : ''}`} x=${x} y="0" width=${Math.max(0.2, width - 0.25)} height="6"><title>${title(step)}: ${duration(step.delta)}</title></rect>`)}
    </svg>
    <figcaption><span class="badge badge-orders">orders</span><span class="badge badge-payments">payments</span><span class="bar-total">${duration(total)}</span></figcaption>
  </figure>`;
}

function Step({ step, onMessage }) {
  const ignored = step.step === 'repeated';
  return html`<li class=${`step step-${step.step} step-of-${step.service} ${step.slowest ? 'is-slowest' : ''}`} data-test="step" data-step=${step.step} data-service=${step.service}>
    <span class="step-delta" title=${absolute(step.at)}>${delta(step)}</span>
    <span class="step-dot" aria-hidden="true"></span>
    <div class="step-body">
      <p class="step-title">${title(step)} <span class=${`badge badge-${step.service}`}>${step.service}</span>${step.slowest && html`<span class="badge badge-slow" data-test="slowest">${t('timeline.slowest')}</span>`}</p>
      <p class="step-facts">${facts(step).map((fact, index) => html`<span key=${index}>${fact}</span>`)}
        ${step.message && html`<button type="button" class="link" onClick=${onMessage} data-test="message">${t('timeline.message')}</button>`}
        ${ignored && html`<span class="unseen">${t('timeline.ignored')}</span>`}
      </p>
    </div>
  </li>`;
}

/// The order waits for its next step.
function InProgress({ since }) {
  const time = useStore(now);
  return html`<li class="step step-in-progress" data-test="under-way">
    <span class="step-delta">${duration(Math.max(0, Math.floor((time - Date.parse(since)) / 1000)) * 1000)}</span>
    <span class="step-dot" aria-hidden="true"></span>
    <div class="step-body"><p class="step-title">${t('timeline.in-progress')}</p></div>
  </li>`;
}

function delta(step) {
  if (step.delta === undefined) return '';
  return step.delta < INSTANT_MS ? t('timeline.same-time') : `+${duration(step.delta)}`;
}

function title(step) {
  const event = tOr(`event.${step.event}`, step.event ?? '');
  const name = step.n > 0 && step.step === 'enqueued' ? 'enqueued-again' : step.step;
  return t(`step.${name}`, { event, n: step.n > 0 && name === 'enqueued-again' ? step.n : step.times ?? 0, service: step.service, outcome: step.outcome && tOr(`outcome.${step.outcome}`, step.outcome) });
}

function facts(step) {
  const list = [];
  if (step.step === 'placed') list.push('POST /v1/orders → 201');
  if (step.stream_sequence && step.step !== 'repeated') list.push(t('fact.sequence', { n: step.stream_sequence, stream: streamOf(step) }));
  if (step.step === 'published') list.push(t('fact.attempts', { n: step.times ?? 1 }));
  if (step.step === 'taken') list.push(t('fact.delivery', { n: step.times ?? 1 }));
  if (step.reason) list.push(tOr(`reason.${step.reason}`, step.reason));
  if (step.balance_after !== undefined) list.push(t('fact.balance', { amount: money(step.balance_after) }));
  list.push(timeOfDay(step.at));
  return list;
}

function streamOf(step) {
  return step.event?.startsWith('gozon.payment.') ? 'PAYMENTS' : 'ORDERS';
}

/// Adds to each step the time since the latest step before it and since the first one. Duplicates
/// never count as the slowest step, because they delay nothing.
function measured(steps) {
  const first = steps.length && precise(steps[0].at);
  let latest;
  const all = causal(steps).map((step) => {
    const at = precise(step.at);
    const delta = latest === undefined ? undefined : Math.max(0, at - latest);
    latest = Math.max(at, latest ?? at);
    return { ...step, delta, total: at - first };
  });
  const end = all.findLastIndex((step) => step.step === 'ended');
  const counted = all.slice(0, end + 1).filter((step) => step.step !== 'repeated' && step.delta);
  const slowest = counted.reduce((most, step) => (step.delta > (most?.delta ?? 0) ? step : most), undefined);
  if (slowest) slowest.slowest = true;
  return all;
}

/// Moves a "published" step before its "taken" step: the consumer may receive a message before the
/// publisher has recorded the publication.
function causal(steps) {
  const ordered = [];
  for (const step of steps) {
    const taken = step.step === 'published' && step.n === 0 ? ordered.findIndex((other) => other.step === 'taken' && other.event_id === step.event_id) : -1;
    if (taken < 0) ordered.push(step);
    else ordered.splice(taken, 0, step);
  }
  return ordered;
}

/// Groups adjacent steps of one transaction: the received message, its effect, and the enqueued
/// event.
function transactions(steps) {
  const groups = [];
  for (const step of steps) {
    const before = groups.at(-1)?.at(-1);
    const opens = step.step === 'placed' || step.step === 'taken';
    const joins = before && !opens && before.service === step.service && WRITTEN.includes(before.step) && WRITTEN.includes(step.step) && !step.n;
    if (joins) groups.at(-1).push(step);
    else groups.push([step]);
  }
  return groups;
}

/// Whether no more steps are expected: the order is final, its events are published, and both
/// services answered.
function isComplete(order, timeline) {
  if (order.status === 'NEW' || timeline.missing.length) return false;
  const published = timeline.steps.filter((step) => step.step === 'published').length;
  return timeline.pruned || published >= timeline.steps.filter((step) => step.step === 'enqueued').length;
}
