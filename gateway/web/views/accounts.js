// An account: balance, statement, and whether the entries add up.

import { html, useEffect, useState } from '../vendor/htm-preact.js';
import { read } from '../api.js';
import { t } from '../i18n.js';
import { money } from '../money.js';
import { useResource } from '../resource.js';
import { go, links } from '../router.js';
import { curl, dev } from '../shell.js';
import { useStore } from '../store.js';
import { Copy, Field, Money, OrderLink, ProblemNote, Shell, LoadingRows, When } from '../ui.js';
import { shopAs, users } from '../users.js';
import { Sparkline } from './sparkline.js';
import { OpenAccount, useAccount } from './account-card.js';

const PAGE = 50;
const TRIES_MAX = 3;
const TRY_AGAIN_MS = 300;
const USER_ID = /^[A-Za-z0-9._-]{1,64}$/;

export function Accounts({ userId }) {
  return userId ? html`<${Account} userId=${userId} />` : html`<${Choose} />`;
}

function Choose() {
  const known = useStore(users);
  const [text, setText] = useState('');
  const [wrong, setWrong] = useState(false);
  const choose = (event) => {
    event.preventDefault();
    if (USER_ID.test(text.trim())) go(links.account(text.trim()));
    else setWrong(true);
  };
  return html`
    <h1 tabindex="-1">${t('nav.accounts')}</h1>
    <section class="card narrow">
      <form class="form" role="search" onSubmit=${choose} noValidate>
        <${Field} name="user" label=${t('accounts.user')} hint=${t('accounts.user-hint')} value=${text} data-search spellcheck=${false} autocapitalize="none"
          onInput=${(event) => { setText(event.target.value); setWrong(false); }} error=${wrong && t('accounts.user-wrong')}>
          <button type="submit" class="button button-main" data-test="user-go">${t('accounts.show')}</button>
        <//>
      </form>
      ${known.length > 0 && html`<h2 class="card-title">${t('accounts.known')}</h2>
        <ul class="names">${known.map((user) => html`<li key=${user} data-row><a class="order-link" href=${links.account(user)}>${user}</a></li>`)}</ul>`}
    </section>`;
}

function Account({ userId }) {
  const { account, problem, reload } = useAccount(userId);
  const statement = useStatement(userId, account);
  useAgainIfDiffers(account, statement.entries, reload);
  const path = `/v1/accounts/${encodeURIComponent(userId)}`;
  const shop = () => {
    shopAs(userId);
    go(links.shop());
  };
  if (problem?.code === 'account_not_found') {
    return html`<h1 tabindex="-1">${userId}</h1><section class="card narrow"><${OpenAccount} userId=${userId} onOpened=${reload} /></section>`;
  }
  return html`
    <h1 tabindex="-1">${userId} <${Copy} text=${userId} /></h1>
    ${problem && html`<${ProblemNote} problem=${problem} />`}
    <section class="card account-summary">
      <div>
        <h2 class="card-title">${t('shop.balance')}</h2>
        <p class="balance" data-test="balance" data-minor=${account?.balance}><span class="money">${account ? money(account.balance) : '\u2007'}</span></p>
        <p class="quiet">${t('account.since')} ${account && html`<${When} at=${account.created_at} />`}</p>
      </div>
      <${Sparkline} values=${(statement.entries ?? []).map((entry) => entry.balance_after).reverse()} label=${t('account.plot')} wide />
      <div class="account-actions">
        <a class="button" href=${links.orders({ user_id: userId })}>${t('account.orders')}</a>
        <button type="button" class="button button-main" onClick=${shop} data-test="shop-as">${t('account.shop-as')}</button>
      </div>
    </section>
    <section class="card card-flush" aria-labelledby="statement">
      <h2 id="statement" class="card-title">${t('account.statement')}</h2>
      <${Statement} account=${account} ...${statement} />
    </section>
    <${Shell} commands=${[curl(path), curl(`${path}/entries`), dev('psql payments'), dev('audit')]} />`;
}

/// The entries read so far, with the account as read at the same time.
function useStatement(userId, account) {
  const [state, setState] = useState({});
  const [problem, setProblem] = useState();
  const path = `/v1/accounts/${encodeURIComponent(userId)}/entries?limit=${PAGE}`;
  const newest = useResource(account && path, account);
  useEffect(() => {
    if (newest.data) setState((before) => joined(before, newest.data));
  }, [newest.data]);
  const readMore = async (cursor) => {
    const page = await read(`${path}&cursor=${cursor}`);
    // Ignored if the list has restarted meanwhile, or if this page was requested twice.
    setState((before) => (before.next === cursor ? { entries: [...before.entries, ...page.items], next: page.next_cursor } : before));
    return page.next_cursor;
  };
  const loadMore = () => readMore(state.next).then(() => setProblem(undefined), setProblem);
  const loadAll = async () => {
    try {
      for (let cursor = state.next; cursor; ) cursor = await readMore(cursor);
      setProblem(undefined);
    } catch (failed) {
      setProblem(failed);
    }
  };
  return { ...state, problem: newest.problem ?? problem, loadMore, loadAll };
}

/// Account and entries are read one after the other, so money may move in between. If they differ,
/// reads again, and shows a difference that persists.
function useAgainIfDiffers(account, entries, reload) {
  const [tries, setTries] = useState(0);
  const differs = account && entries?.length > 0 && entries[0].balance_after !== account.balance;
  useEffect(() => {
    if (!differs) return setTries(0);
    if (tries >= TRIES_MAX) return;
    const timer = setTimeout(() => {
      setTries(tries + 1);
      reload();
    }, TRY_AGAIN_MS);
    return () => clearTimeout(timer);
  }, [differs, tries]);
}

/// Puts the newest page in front of the entries read before. Entry numbers reveal a gap; then the
/// list restarts.
function joined({ entries, next }, page) {
  const anew = { entries: page.items, next: page.next_cursor };
  if (!entries?.length || !page.items.length) return anew;
  const newer = page.items.filter((entry) => entry.entry_no > entries[0].entry_no);
  return newer.length === 0 || newer.at(-1).entry_no === entries[0].entry_no + 1 ? { entries: [...newer, ...entries], next } : anew;
}

function Statement({ account, entries, next, problem, loadMore, loadAll }) {
  if (!entries) return problem ? html`<${ProblemNote} problem=${problem} />` : html`<${LoadingRows} rows=${6} />`;
  if (!entries.length) return html`<p class="empty">${t('account.empty')} <code>./dev order 1299 ${account.user_id}</code></p>`;
  return html`
    <${Check} account=${account} entries=${entries} next=${next} loadAll=${loadAll} />
    <table class="statement" data-test="statement">
      <thead><tr><th scope="col">${t('account.when')}</th><th scope="col">${t('account.what')}</th><th scope="col" class="number">${t('account.amount')}</th><th scope="col" class="number">${t('account.after')}</th></tr></thead>
      <tbody>${entries.map((entry) => html`<tr key=${entry.entry_no} data-row data-test="entry">
        <td><${When} at=${entry.created_at} /></td>
        <td>${t(`entry.${entry.kind}`)}${entry.order_id && html` <${OrderLink} id=${entry.order_id} />`}</td>
        <td class=${`number ${entry.amount > 0 ? 'is-in' : ''}`}><${Money} minor=${entry.amount} signed /></td>
        <td class="number"><${Money} minor=${entry.balance_after} /></td>
      </tr>`)}</tbody>
    </table>
    ${problem && html`<${ProblemNote} problem=${problem} />`}
    ${next && html`<p class="card-foot"><button type="button" class="button" onClick=${loadMore} data-test="more">${t('more')}</button></p>`}`;
}

/// Adds up the entries here and compares the sum with the balance that the API returns.
function Check({ account, entries, next, loadAll }) {
  const wrong = entries.find((entry, index) => entry.balance_after - entry.amount !== (entries[index + 1]?.balance_after ?? (next ? entry.balance_after - entry.amount : 0)));
  const matches = !wrong && entries[0].balance_after === account.balance;
  return html`<p class=${`check ${matches ? 'is-good' : 'is-bad'}`} role="status" data-test="sums" data-match=${String(matches)}>
    <span aria-hidden="true">${matches ? '✓' : '✗'}</span>
    ${!matches ? t('check.differs') : next ? t('check.some', { n: entries.length, all: entries[0].entry_no }) : t('check.all', { n: entries.length })}
    ${matches && next && html` <button type="button" class="link" onClick=${loadAll} data-test="check-all">${t('check.load')}</button>`}
  </p>`;
}
