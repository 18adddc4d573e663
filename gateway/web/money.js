// Amounts are integers of minor units, never fractions.

import { read } from './api.js';
import { language } from './i18n.js';
import { recall, remember } from './storage.js';
import { store } from './store.js';

/// The currency of all accounts. It is part of the account resource.
export const currency = store(recall('currency', null));

export function learnCurrency(account) {
  currency.set(account.currency);
  remember('currency', account.currency);
}

/// Users whose accounts were already requested. Some users who order have no account.
const requested = new Set();

/// Lists of orders do not contain the currency, but any account does.
export async function askCurrency(userIds) {
  for (const userId of userIds) {
    if (currency.get()) return;
    if (requested.has(userId)) continue;
    requested.add(userId);
    const problem = await read(`/v1/accounts/${encodeURIComponent(userId)}`).then(learnCurrency, (problem) => problem);
    if (!problem?.isOpen) continue;
    // The next caller retries.
    requested.delete(userId);
    return;
  }
}

export function money(minor, { signed = false } = {}) {
  return format(signed ? 'exceptZero' : 'auto').format(decimal(minor));
}

/// Parses an input as minor units. Returns null if it is not an amount, or if the number of digits
/// of the currency is not known yet.
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

/// As a string, because large numbers with a fraction are not exact.
function decimal(minor) {
  const places = digits();
  const text = String(Math.abs(minor)).padStart(places + 1, '0');
  const cut = text.length - places;
  return (minor < 0 ? '-' : '') + text.slice(0, cut) + (places ? `.${text.slice(cut)}` : '');
}
