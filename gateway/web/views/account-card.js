// The current account: its user, its balance, and a deposit form.

import { html, useEffect, useRef, useState } from '../vendor/htm-preact.js';
import { submitRequests } from '../pending-requests.js';
import { t } from '../i18n.js';
import { onChange, reloads } from '../live.js';
import { currency, learnCurrency, money, parseMoney } from '../money.js';
import { useResource } from '../resource.js';
import { links } from '../router.js';
import { useStore } from '../store.js';
import { Field, ProblemNote, announce, fieldError } from '../ui.js';
import { shopAs, users } from '../users.js';

const QUICK = [10_000, 50_000, 100_000];

/// The account, read again whenever one of its orders becomes final.
export function useAccount(userId) {
  const reloadCount = useStore(reloads);
  const { data: account, problem, reload } = useResource(userId && `/v1/accounts/${encodeURIComponent(userId)}`, reloadCount);
  useEffect(() => onChange((change) => change.user_id === userId && change.status !== 'NEW' && reload()), [userId]);
  useEffect(() => {
    if (account) learnCurrency(account);
  }, [account]);
  return { account, problem, reload };
}

export function AccountCard({ userId }) {
  const { account, problem, reload } = useAccount(userId);
  const others = useStore(users).filter((other) => other !== userId);
  return html`<section class="card account" aria-labelledby="balance">
    <div class="account-head">
      <div>
        <h2 id="balance" class="card-title">${t('shop.balance')}</h2>
        <${Balance} account=${account} />
      </div>
      <div class="account-who">
        <a href=${links.account(userId)} data-test="account-link">${userId}</a>
        ${others.length > 0 && html`<select aria-label=${t('shop.switch')} onChange=${(event) => shopAs(event.target.value)} data-test="switch-user">
          <option value=${userId} selected>${t('shop.switch')}</option>
          ${others.map((other) => html`<option key=${other} value=${other}>${other}</option>`)}
        </select>`}
        <a class="quiet" href=${links.accounts()}>${t('shop.other-user')}</a>
      </div>
    </div>
    ${problem?.code === 'account_not_found' ? html`<${OpenAccount} userId=${userId} onOpened=${reload} />`
      : html`<${TopUp} userId=${userId} onAdded=${reload} />${problem && html`<${ProblemNote} problem=${problem} />`}`}
  </section>`;
}

/// The balance, and for a moment its last change.
function Balance({ account }) {
  const before = useRef();
  const [change, setChange] = useState();
  useEffect(() => {
    if (!account) return;
    const by = account.balance - (before.current ?? account.balance);
    before.current = account.balance;
    if (by) setChange({ by, at: Date.now() });
  }, [account?.balance]);
  return html`<p class="balance" data-test="balance" data-minor=${account?.balance}>
    <span class="money">${account ? money(account.balance) : '\u2007'}</span>
    ${change && html`<span key=${change.at} class=${`balance-change ${change.by < 0 ? 'is-out' : 'is-in'}`} aria-hidden="true">${money(change.by, { signed: true })}</span>`}
  </p>`;
}

function TopUp({ userId, onAdded }) {
  const known = useStore(currency);
  const [amount, setAmount] = useState('');
  const [problem, setProblem] = useState();
  const [wrong, setWrong] = useState(false);
  const [sending, setSending] = useState(false);
  const resting = !known || sending;
  const add = async (minor) => {
    setProblem(undefined);
    setSending(true);
    try {
      await submitRequests([{ kind: 'deposit', path: `/v1/accounts/${encodeURIComponent(userId)}/deposits`, body: { amount: minor } }]);
      setAmount('');
      announce(t('shop.added', { amount: money(minor) }));
      onAdded();
    } catch (refused) {
      setProblem(refused);
    } finally {
      setSending(false);
    }
  };
  const submit = (event) => {
    event.preventDefault();
    const minor = parseMoney(amount);
    if (minor === null) setWrong(true);
    else add(minor);
  };
  const type = (event) => {
    setAmount(event.target.value);
    setWrong(false);
    setProblem(undefined);
  };
  return html`<form class="top-up" onSubmit=${submit} noValidate>
    <${Field} name="top-up" label=${t('shop.top-up')} inputmode="decimal" placeholder=${money(100_000)} value=${amount} onInput=${type}
      disabled=${!known} hint=${!known && t('money.unknown')} error=${wrong ? t('field.money') : fieldError(problem, '/amount')}>
      <button type="submit" class="button" disabled=${resting} data-test="top-up-submit">${t('shop.add')}</button>
    <//>
    <div class="quick">${QUICK.map((minor) => html`<button key=${minor} type="button" class="chip" disabled=${resting} onClick=${() => add(minor)} data-test="top-up-${minor}">+${money(minor)}</button>`)}</div>
    ${problem && !problem.errors.length && html`<${ProblemNote} problem=${problem} />`}
  </form>`;
}

/// Form for a user without an account.
export function OpenAccount({ userId, onOpened }) {
  const [problem, setProblem] = useState();
  const [sending, setSending] = useState(false);
  const open = async () => {
    setProblem(undefined);
    setSending(true);
    try {
      await submitRequests([{ kind: 'account', path: '/v1/accounts', body: { user_id: userId } }]);
      shopAs(userId);
      onOpened();
    } catch (refused) {
      setProblem(refused);
    } finally {
      setSending(false);
    }
  };
  return html`<div class="open-account" data-test="open-account">
    <p>${t('account.none', { user: userId })}</p>
    <button type="button" class="button button-main" disabled=${sending} onClick=${open} data-test="open-account-submit">${t('account.open')}</button>
    ${problem && html`<${ProblemNote} problem=${problem} />`}
  </div>`;
}
