// Texts in the user's language.

import { recall, remember } from './storage.js';
import { store } from './store.js';

export const LANGUAGES = { en: 'English', ru: 'Русский' };

const preferred = navigator.languages.map((tag) => tag.slice(0, 2)).find((tag) => tag in LANGUAGES) ?? 'en';
const chosen = recall('language');

export const language = store(null);
let words = {};

export async function speak(tag = chosen in LANGUAGES ? chosen : preferred) {
  words = (await import(`./i18n/${tag}.js`)).default;
  document.documentElement.lang = tag;
  language.set(tag);
}

export function choose(tag) {
  remember('language', tag);
  return speak(tag);
}

/// `values` replace the names in braces. An entry with plural forms ({ one, few, many, other }) is
/// selected by `values.n`.
export function t(name, values = {}) {
  const entry = words[name] ?? name;
  const text = typeof entry === 'string' ? entry : entry[new Intl.PluralRules(language.get()).select(values.n)] ?? entry.other;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? '');
}

/// The text for a name of the API, or the API's own text if there is none.
export function tOr(name, otherwise) {
  return name in words ? t(name) : otherwise;
}
