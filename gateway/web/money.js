// Amounts: integers of minor units, never fractions of anything.

import { read } from './api.js';
import { language } from './i18n.js';
import { recall, remember } from './storage.js';
import { store } from './store.js';

/// Of all accounts alike; accounts tell it.
export const currency = store(recall('currency', null));

export function learnCurrency(account) {
  currency.set(account.currency);
  remember('currency', account.currency);
}

/// Whose accounts were asked for already: not everybody who orders has one.
const asked = new Set();

/// Lists of orders do not tell the currency. Any of their accounts does.
export async function askCurrency(userIds) {
  for (const userId of userIds) {
    if (currency.get()) return;
    if (asked.has(userId)) continue;
    asked.add(userId);
    const problem = await read(`/v1/accounts/${encodeURIComponent(userId)}`).then(learnCurrency, (problem) => problem);
    if (!problem?.isOpen) continue;
    // Who asks next asks again.
    asked.delete(userId);
    return;
  }
}

export function money(minor, { signed = false } = {}) {
  return format(signed ? 'exceptZero' : 'auto').format(decimal(minor));
}

/// What somebody typed, as minor units; null if it is no amount, or if nobody knows yet how many digits the currency has.
export function parseMoney(text) {
  if (!currency.get()) return null;
  const match = /^(\d{1,13})(?:[.,](\d*))?$/.exec(text.replace(/[\s\u00a0\u202f]/g, ''));
  const [, whole, fraction = ''] = match ?? [];
  if (!match || fraction.length > digits()) return null;
  return Number(whole + fraction.padEnd(digits(), '0'));
}

function format(signDisplay) {
  const unit = currency.get() ? { style: 'currency', currency: currency.get(), currencyDisplay: 'narrowSymbol' } : { minimumFractionDigits: 2, maximumFractionDigits: 2 };
  return new Intl.NumberFormat(language.get(), { ...unit, signDisplay });
}

function digits() {
  return format('auto').resolvedOptions().maximumFractionDigits;
}

/// As text, because a fraction of a large number is not exact.
function decimal(minor) {
  const places = digits();
  const text = String(Math.abs(minor)).padStart(places + 1, '0');
  const cut = text.length - places;
  return (minor < 0 ? '-' : '') + text.slice(0, cut) + (places ? `.${text.slice(cut)}` : '');
}
