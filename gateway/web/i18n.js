// Words in the reader's language.

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

/// `values` fill the places in braces; an entry with forms ({ one, few, many, other }) goes by `values.n`.
export function t(name, values = {}) {
  const entry = words[name] ?? name;
  const text = typeof entry === 'string' ? entry : entry[new Intl.PluralRules(language.get()).select(values.n)] ?? entry.other;
  return text.replace(/\{(\w+)\}/g, (_, place) => values[place] ?? '');
}

/// The words for something that the API names, or what the API itself says.
export function tOr(name, otherwise) {
  return name in words ? t(name) : otherwise;
}
