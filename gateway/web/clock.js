// Formats times and durations.

import { language } from './i18n.js';
import { store } from './store.js';

const UNITS = [['day', 86_400], ['hour', 3_600], ['minute', 60], ['second', 1]];

/// The current time, for relative times.
export const now = store(Date.now());
setInterval(() => document.hidden || now.set(Date.now()), 1_000);

export function relative(at, to) {
  const seconds = Math.min(0, Math.round((Date.parse(at) - to) / 1000));
  const [unit, size] = UNITS.find(([, size]) => -seconds >= size) ?? UNITS.at(-1);
  return new Intl.RelativeTimeFormat(language.get(), { numeric: 'auto', style: 'short' }).format(Math.ceil(seconds / size), unit);
}

export function absolute(at) {
  return new Intl.DateTimeFormat(language.get(), { dateStyle: 'medium', timeStyle: 'long' }).format(new Date(at));
}

/// With milliseconds.
export function timeOfDay(at) {
  const options = { hour: '2-digit', minute: '2-digit', second: '2-digit', fractionalSecondDigits: 3, hourCycle: 'h23' };
  return new Intl.DateTimeFormat(language.get(), options).format(new Date(at));
}

/// Milliseconds since the epoch, with the microseconds of the API, which Date would drop.
export function precise(at) {
  const [, second, fraction = ''] = /^(.*?)(?:\.(\d+))?Z$/.exec(at) ?? [, at];
  return Date.parse(`${second}Z`) + 1000 * Number(`0.${fraction || 0}`);
}

export function duration(ms) {
  const [value, unit, places] = ms < 10 ? [ms, 'millisecond', 1] : ms < 1_000 ? [ms, 'millisecond', 0] : ms < 60_000 ? [ms / 1_000, 'second', 1]
    : ms < 3_600_000 ? [ms / 60_000, 'minute', 1] : [ms / 3_600_000, 'hour', 1];
  return new Intl.NumberFormat(language.get(), { style: 'unit', unit, unitDisplay: 'short', maximumFractionDigits: places }).format(value);
}
