// The operator's view: backlog, its age, rates and dead letters.

import { html, useEffect, useState } from '../vendor/htm-preact.js';
import { read } from '../api.js';
import { duration } from '../clock.js';
import { language, t } from '../i18n.js';
import { rates } from '../rates.js';
import { curl, dev, nats } from '../shell.js';
import { ProblemNote, Shell, LoadingRows } from '../ui.js';
import { DeadLetters } from './dead-letters.js';
import { Sparkline } from './sparkline.js';

const ASK_MS = 2_000;
/// Number of samples in five minutes.
const SAMPLES_MAX = 150;
/// Older backlog is highlighted.
const OUTBOX_AGE_MAX_S = 60;
const NEW_AGE_MAX_S = 180;

/// Samples are kept while other views are shown.
const samples = [];

export function Flow() {
  const { flow, problem } = useFlow();
  const setAside = flow && ['orders', 'payments'].map((name) => flow[name] && flow[name].poison + flow[name].quarantine).join();
  return html`
    <h1 tabindex="-1">${t('nav.flow')}</h1>
    ${problem && html`<${ProblemNote} problem=${problem} />`}
    ${!flow && !problem && html`<${LoadingRows} rows=${16} />`}
    ${flow && html`
      <${Rates} />
      <div class="services">
        ${['orders', 'payments'].map((name) => html`<${Service} key=${name} name=${name} flow=${flow[name]} />`)}
      </div>`}
    ${(flow || problem) && html`<${DeadLetters} setAside=${setAside} />
      <${Shell} commands=${[curl('/v1/ops/flow'), dev('outbox'), dev('consumers ORDERS'), dev('audit'), nats('consumer report ORDERS')]} />`}`;
}

function useFlow() {
  const [state, setState] = useState({ flow: samples.at(-1) });
  useEffect(() => {
    const abort = new AbortController();
    let timer;
    const ask = async () => {
      if (!document.hidden) {
        try {
          const flow = await read('/v1/ops/flow', { signal: abort.signal });
          samples.push(flow);
          if (samples.length > SAMPLES_MAX) samples.shift();
          setState({ flow });
        } catch (problem) {
          if (abort.signal.aborted) return;
          setState((before) => ({ ...before, problem }));
        }
      }
      timer = setTimeout(ask, ASK_MS);
    };
    ask();
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, []);
  return state;
}

function Rates() {
  return html`<section class="card rates" aria-labelledby="rates" data-test="rates">
    <div><h2 id="rates" class="card-title">${t('flow.rates')}</h2><p class="quiet">${t('flow.rates-since')}</p></div>
    <div class="figures">${['NEW', 'FINISHED', 'CANCELLED'].map((status) => {
      const values = rates(status);
      return html`<${Figure} key=${status} name=${t(`rate.${status}`)} value=${perSecond(values.at(-1))} values=${values} more=${t('rate.peak', { n: perSecond(Math.max(...values)) })} />`;
    })}</div>
  </section>`;
}

function Service({ name, flow }) {
  if (!flow) return html`<section class="card service is-away" data-test="service-${name}"><h2><span class="badge badge-${name}">${name}</span></h2><p role="status">${t('flow.away', { service: name })}</p></section>`;
  const past = (pick) => samples.map((sample) => (sample[name] ? pick(sample[name]) : null));
  return html`<section class="card service" aria-labelledby="service-${name}" data-test="service-${name}">
    <h2 id="service-${name}"><span class="badge badge-${name}">${name}</span></h2>
    <div class="figures">
      ${flow.new_orders !== undefined && html`<${Figure} name=${t('flow.new')} value=${whole(flow.new_orders)} values=${past((one) => one.new_orders)} more=${age(flow.new_orders, flow.new_oldest_seconds)} alarm=${flow.new_oldest_seconds > NEW_AGE_MAX_S} test="new" />`}
      <${Figure} name=${t('flow.outbox')} value=${whole(flow.outbox_pending)} values=${past((one) => one.outbox_pending)} more=${age(flow.outbox_pending, flow.outbox_oldest_seconds)} alarm=${flow.outbox_oldest_seconds > OUTBOX_AGE_MAX_S} test="outbox" />
      ${flow.consumer
        ? html`<${Figure} name=${t('flow.pending')} value=${whole(flow.consumer.pending)} values=${past((one) => one.consumer?.pending ?? null)} more=${t('flow.in-progress', { n: whole(flow.consumer.ack_pending), again: whole(flow.consumer.redelivered) })} test="consumer" />`
        : html`<p class="figure" role="status">${t('flow.no-broker')}</p>`}
      <div class=${`figure ${flow.poison + flow.quarantine ? 'is-alarm' : ''}`} data-test="set-aside"><span class="figure-name">${t('flow.set-aside')}</span><span class="figure-value">${whole(flow.poison + flow.quarantine)}</span><span class="figure-more">${t('flow.kinds', { poison: flow.poison, quarantine: flow.quarantine })}</span></div>
    </div>
    ${flow.consumer && html`<p class="quiet">${t('flow.consumer')} <code>${flow.consumer.name}</code></p>`}
  </section>`;
}

function Figure({ name, value, values, more, alarm, test }) {
  return html`<div class=${`figure ${alarm ? 'is-alarm' : ''}`} data-test=${test}>
    <span class="figure-name">${name}</span>
    <span class="figure-value">${value}</span>
    <${Sparkline} values=${values} label=${t('flow.plot', { name })} />
    <span class="figure-more">${more ?? '\u00a0'}</span>
  </div>`;
}

function age(count, seconds) {
  return count ? t('flow.oldest', { age: duration(1000 * seconds) }) : t('flow.nothing');
}

function whole(number) {
  return new Intl.NumberFormat(language.get()).format(number);
}

function perSecond(number) {
  return t('rate.per-second', { n: new Intl.NumberFormat(language.get(), { maximumFractionDigits: 1 }).format(number) });
}
