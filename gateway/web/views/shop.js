// The shop: the account, goods to buy, and the customer's live orders.

import { html, useState } from '../vendor/htm-preact.js';
import { read } from '../api.js';
import { pendingRequests, submitRequests } from '../pending-requests.js';
import { t } from '../i18n.js';
import { noteOwnChange } from '../live.js';
import { currency, learnCurrency, money, parseMoney } from '../money.js';
import { useOrderList } from '../order-list.js';
import { links } from '../router.js';
import { curl, curlPost, dev } from '../shell.js';
import { useStore } from '../store.js';
import { Field, Icon, ProblemNote, Shell, LoadingRows, announce, fieldError, focusTitle } from '../ui.js';
import { demoName, shopAs, shopper } from '../users.js';
import { OrderRows } from './order-rows.js';
import { AccountCard } from './account-card.js';

const DEMO_MONEY = 100_000;
const GOODS = [['tea', 450], ['lamp', 1_299], ['book', 2_400], ['bike', 125_000]];
const SHOWN = 10;
const WAIT_SECONDS = 10;

export function Shop() {
  const userId = useStore(shopper);
  return userId ? html`<${Open} key=${userId} userId=${userId} />` : html`<${FirstVisit} />`;
}

function FirstVisit() {
  const [pressed, setPressed] = useState(false);
  // After a reload the demo continues by itself; starting another one would open a second account.
  const resuming = useStore(pendingRequests).some(({ steps }) => steps[0].kind === 'account');
  const busy = pressed || resuming;
  const [problem, setProblem] = useState();
  const start = async () => {
    setPressed(true);
    setProblem(undefined);
    const userId = demoName();
    const account = encodeURIComponent(userId);
    try {
      const answers = await submitRequests([
        { kind: 'account', path: '/v1/accounts', body: { user_id: userId } },
        { kind: 'deposit', path: `/v1/accounts/${account}/deposits`, body: { amount: DEMO_MONEY } },
        orderStep(userId, GOODS[1][1], t('goods.lamp')),
      ]);
      learnCurrency(answers[0].answer);
      shopAs(userId);
      follow(answers.at(-1).answer);
      requestAnimationFrame(focusTitle);
    } catch (refused) {
      setProblem(refused);
      setPressed(false);
    }
  };
  return html`<section class="hero">
    <h1 tabindex="-1">${t('hero.title')}</h1>
    <p class="lead">${t('hero.lead')}</p>
    <button type="button" class="button button-main button-large" onClick=${start} disabled=${busy} data-test="demo">${busy ? t('hero.busy') : t('hero.start')}</button>
    ${problem && html`<${ProblemNote} problem=${problem} />`}
    <p class="quiet">${t('hero.or')} <a href=${links.accounts()}>${t('hero.account')}</a></p>
    <ol class="promise">${['once', 'never', 'see'].map((name) => html`<li key=${name}><strong>${t(`promise.${name}`)}</strong><span>${t(`promise.${name}-why`)}</span></li>`)}</ol>
  </section>`;
}

function Open({ userId }) {
  const { orders, problem } = useOrderList({ userId, limit: SHOWN });
  const path = `/v1/orders?user_id=${encodeURIComponent(userId)}`;
  return html`
    <h1 tabindex="-1">${t('nav.shop')}</h1>
    <div class="columns">
      <div class="stack">
        <${AccountCard} userId=${userId} />
        <${Goods} userId=${userId} />
      </div>
      <section class="card card-flush" aria-labelledby="yours">
        <h2 id="yours" class="card-title">${t('shop.yours')}</h2>
        ${problem && html`<${ProblemNote} problem=${problem} />`}
        ${!orders && !problem && html`<${LoadingRows} rows=${5} />`}
        ${orders && !orders.length && html`<p class="empty">${t('shop.none')}</p>`}
        ${orders?.length > 0 && html`<${OrderRows} orders=${orders.slice(0, SHOWN)} />
          <p class="card-foot"><a href=${links.orders({ user_id: userId })}>${t('shop.all')}</a></p>`}
      </section>
    </div>
    <${Shell} commands=${[curlPost('/v1/orders', { user_id: userId, amount: 1299, description: 'A lamp' }, 'my-key'), dev(`order 1299 ${userId}`), curl(path)]} />`;
}

function Goods({ userId }) {
  const known = useStore(currency);
  const [amount, setAmount] = useState('');
  const [description, setDescription] = useState('');
  const [problem, setProblem] = useState();
  const [wrong, setWrong] = useState(false);
  const [sending, setSending] = useState(0);

  const place = async (minor, what) => {
    setProblem(undefined);
    setSending((count) => count + 1);
    try {
      const [{ answer }] = await submitRequests([orderStep(userId, minor, what)]);
      follow(answer);
      return true;
    } catch (refused) {
      setProblem(refused);
      return false;
    } finally {
      setSending((count) => count - 1);
    }
  };
  const submit = async (event) => {
    event.preventDefault();
    const minor = parseMoney(amount);
    if (minor === null) return setWrong(true);
    if (await place(minor, description)) {
      setAmount('');
      setDescription('');
    }
  };
  // The error stays until the input changes.
  const typed = (set) => (event) => {
    set(event.target.value);
    setWrong(false);
    setProblem(undefined);
  };
  const other = problem && !problem.errors.length;
  return html`<section class="card" aria-labelledby="goods">
    <h2 id="goods" class="card-title">${t('shop.buy')}</h2>
    <div class="goods">
      ${GOODS.map(([name, minor]) => html`<button key=${name} type="button" class="good" disabled=${!known} onClick=${() => place(minor, t(`goods.${name}`))} data-test="buy-${name}">
        <${Icon} name=${name} /><span>${t(`goods.${name}`)}</span><span class="money">${money(minor)}</span>
      </button>`)}
    </div>
    <form class="form" onSubmit=${submit} noValidate>
      <${Field} name="order-amount" label=${t('shop.amount')} inputmode="decimal" placeholder=${money(1299)} value=${amount}
        disabled=${!known} hint=${!known && t('money.unknown')} onInput=${typed(setAmount)} error=${wrong ? t('field.money') : fieldError(problem, '/amount')} />
      <${Field} name="order-description" label=${t('shop.what')} value=${description} placeholder=${t('shop.what-example')}
        onInput=${typed(setDescription)} error=${fieldError(problem, '/description')} />
      <button type="submit" class="button button-main" disabled=${!known || sending > 0} data-test="place">${t('shop.place')}</button>
    </form>
    ${(other || fieldError(problem, '/user_id')) && html`<${ProblemNote} problem=${problem} />`}
  </section>`;
}

function orderStep(userId, amount, description) {
  return { kind: 'order', path: '/v1/orders', body: { user_id: userId, amount, description } };
}

/// Events report the final status. One additional request works without events too.
async function follow(order) {
  noteOwnChange(order);
  announce(t('shop.placed', { amount: money(order.amount) }));
  const ended = await read(`/v1/orders/${order.id}?wait=${WAIT_SECONDS}`, { timeoutMs: 1000 * (WAIT_SECONDS + 5) }).catch(() => order);
  if (ended.status === 'NEW') return;
  noteOwnChange(ended);
  announce(t('shop.ended', { amount: money(order.amount), status: t(`status.${ended.status}`) }));
}
